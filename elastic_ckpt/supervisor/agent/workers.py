"""Watches this node's workers as processes: which run, which failed first, and ends the rest.

How a worker ended is decided from its process and the board alone. Torch elastic waits for return
values, which a worker that leaves by ``os._exit`` never sends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

from elastic_ckpt.policy.own_saves import command_of, signal_of
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.ended import ended_early, outcome_of_zero
from elastic_ckpt.protocol.slot import Outcome, Slot
from elastic_ckpt.supervisor.agent.launch import WorkerProcess
from elastic_ckpt.supervisor.agent.verdict import (
    BY_OTHERS,
    StuckWorker,
    exit_text,
    explain,
    signal_name,
)
from elastic_ckpt.util.outlet import print_error
from elastic_ckpt.util.processes import (
    copies,
    descendants,
    is_resource_tracker,
    kill_all,
    process_state,
    reap,
)

log = logging.getLogger(__name__)

LEARN_SECONDS: Final = 0.02
"""Interval at which to look for new workers; the kernel reports the end of known ones."""

LINGER_SECONDS: Final = 10.0
"""Time for workers to exit after the last of them has posted its outcome."""


WARN_SECONDS: Final = 10.0
STUCK_SECONDS: Final = 300.0
"""How long a worker may be there after SIGKILL, in a system call that a dead disk or device does
not end, until the user hears of it, and until the run ends."""


STATUS_SECONDS: Final = 1.0
"""How long the template may take to report the exit status of a worker that is gone."""

RETURN_SECONDS: Final = 1.0
"""How long torch elastic may take to return after the last worker is gone."""


DAEMON_SECONDS: Final = 0.3
"""How long a copy of a worker that outlives it may take to make a session of its own."""


class Workers:
    """Watches the workers of one incarnation after another; for the agent's main thread only. Of
    the first failure it has ``failed_at`` and ``noticed_at``, as in ``protocol/ended.py``."""

    def __init__(self, board: Board, selector: selectors.BaseSelector) -> None:
        """The selector gets a pidfd per worker, so that a death ends the agent's wait."""
        self.failed_at = self.noticed_at = 0
        self._board = board
        self._selector = selector
        self._known: set[int] = set()  # local ranks whose pid is known
        self._pidfds: dict[int, int] = {}  # local rank -> pidfd, while the worker lives
        self._culprit: Slot | None = None
        self._hung = -1
        self._killed_before = False  # SIGKILL was sent from here before one failed
        self._woken_at = 0
        self._all_left_at: float | None = None
        self._gone_at: float | None = None  # when the last worker was gone
        self._silent = False  # a worker ended well, but not by returning
        self._killed_at: float | None = None
        self._warned = False

    def patience(self) -> float:
        """Return the seconds after which to call :meth:`watch` again without an event."""
        waits = len(self._known) < self._board.slots or self._silent or self._all_gone
        return LEARN_SECONDS if waits else 1.0

    @property
    def _all_gone(self) -> bool:
        return len(self._known) == self._board.slots and not self._pidfds

    @property
    def left_well(self) -> bool:
        """Whether every worker started, posted an outcome, did not fail, and is gone."""
        outcomes = {slot.outcome for slot in self._board.read_slots()}
        return self._all_gone and not {Outcome.NONE, Outcome.FAILED} & outcomes

    @property
    def long_gone(self) -> bool:
        """Whether all workers have been gone for longer than torch elastic takes to return."""
        patience = 0.0 if self._silent else RETURN_SECONDS
        return self._gone_at is not None and time.monotonic() >= self._gone_at + patience

    @property
    def any_left(self) -> bool:
        """Whether any worker's process still runs."""
        return any(process.is_there for process in list(WorkerProcess.started))

    def watch(self) -> None:
        """Find new workers; when the first one fails or dies, kill the others: torch elastic would
        send SIGTERM and wait 30 s for ranks that block in a collective."""
        self._woken_at = time.monotonic_ns()
        for slot in self._board.read_slots():
            if slot.pid and slot.local_rank not in self._known:
                self._follow(slot)
        exited = [local_rank for local_rank, pidfd in self._pidfds.items() if _exited(pidfd)]
        for local_rank in exited:
            self._unfollow(self._pidfds.pop(local_rank))
        if exited:
            self._lost(exited)
        self._end_early()
        self._end_lingering()
        self._warn_of_stuck()
        if self._all_gone and self._gone_at is None:
            self._gone_at = time.monotonic()

    def _end_lingering(self) -> None:
        """Kill workers that do not exit after their outcome.

        The clean-up of a worker whose work is sealed must not use up the notice, and one that
        failed, kept alive by a thread of its own, must not keep the others waiting.
        """
        outcomes = [slot.outcome for slot in self._board.read_slots()]
        if Outcome.FAILED not in outcomes and Outcome.NONE in outcomes:
            self._all_left_at = None
        elif self._all_left_at is None:
            self._all_left_at = time.monotonic()
        elif time.monotonic() > self._all_left_at + self._linger_seconds(set(outcomes)):
            self._lost([])  # find the first failure before the kill
            self.kill()

    def _linger_seconds(self, outcomes: set[Outcome]) -> float:
        """Return how long to let workers exit; those that only wait for a return value, not at all.

        A worker posts COMPLETED after its exit hooks, and then returns to torch elastic.
        """
        return 0.0 if self._silent and outcomes == {Outcome.COMPLETED} else LINGER_SECONDS

    def stuck(self, seconds: float = STUCK_SECONDS) -> list[StuckWorker]:
        """Return the workers that are still there so long after SIGKILL."""
        if self._killed_at is None or time.monotonic() < self._killed_at + seconds:
            return []
        slots = self._board.read_slots()
        left = [slot for slot in slots if slot.local_rank in self._pidfds]
        return [StuckWorker(slot.rank, slot.pid, process_state(slot.pid)) for slot in left]

    def _warn_of_stuck(self) -> None:
        if not self._warned and (left := self.stuck(WARN_SECONDS)):
            self._warned = True
            line = (
                f"{left[0]} is still there {WARN_SECONDS:.0f} s after SIGKILL: a disk or device "
                "does not answer; no new worker starts before it ends; waiting "
                f"{STUCK_SECONDS:.0f} s"
            )
            log.warning("%s", line)
            print_error(f"elastic-ckpt: {line}")

    def _end_early(self) -> None:
        """Fail if a rank ended with code 0 while others train and wait for it."""
        early = ended_early(self._board.read_slots(), time.monotonic_ns())
        if early is not None and self._culprit is None:
            self._blame(early)

    def _follow(self, slot: Slot) -> None:
        self._known.add(slot.local_rank)
        log.info("rank %d runs: pid %d", slot.rank, slot.pid, extra={"rank": slot.rank})
        try:
            pidfd = os.pidfd_open(slot.pid)
        except ProcessLookupError:
            self._lost([slot.local_rank])
            return
        self._pidfds[slot.local_rank] = pidfd
        self._selector.register(pidfd, selectors.EVENT_READ)

    def _unfollow(self, pidfd: int) -> None:
        self._selector.unregister(pidfd)
        os.close(pidfd)

    def _lost(self, exited: list[int]) -> None:
        """Find the first failure among workers that are gone; if there is one, kill the rest. One
        that died without an outcome comes before those that could post theirs: it was their
        cause."""
        if self._culprit is not None:
            return
        for local_rank in exited:
            self._settle(self._board.read_slot(local_rank))
        slots = self._board.read_slots()
        died = [slots[rank] for rank in exited if slots[rank].outcome is Outcome.NONE]
        failed = [slot for slot in slots if slot.outcome is Outcome.FAILED]
        if not died and not failed:
            return
        self._blame(died[0] if died else min(failed, key=lambda slot: slot.left))

    def _settle(self, slot: Slot) -> None:
        """Post the outcome of a worker that is gone, ended with code 0 and posted none itself."""
        if slot.outcome is not Outcome.NONE or _exit_status(slot.pid, STATUS_SECONDS) != 0:
            return
        outcome = outcome_of_zero(slot, stop_wanted=self._board.stop_wanted)
        if outcome is not Outcome.NONE:
            self._silent = True
            self._board.rank_slot(slot.local_rank).leave(outcome)

    def _blame(self, slot: Slot) -> None:
        self._culprit, self._killed_before = slot, self._killed_at is not None
        self.failed_at = slot.left or self._woken_at
        self._board.abort(self._board.flag)
        self.kill()
        self.noticed_at = time.monotonic_ns()

    def kill(self, number: int = signal.SIGKILL, hung: int = -1) -> None:
        """Send a signal to every worker; ``hung`` is the rank that is to blame, -1 for none."""
        self._hung = max(self._hung, hung)
        sent = [
            process.pid for process in list(WorkerProcess.started) if process.send_signal(number)
        ]
        if sent and number == signal.SIGKILL and self._killed_at is None:
            self._killed_at = time.monotonic()
        if sent:
            log.info("sent %s to %s", signal_name(number), sent)

    def ask_to_save(self, on_notice: str) -> None:
        """Make a script save that takes no part in the agreement: by a signal to every worker, or
        by a shell command that finds their pids in ELASTIC_CKPT_PIDS."""
        number = signal_of(on_notice)
        if number is not None:
            self.kill(number)
            return
        pids = " ".join(str(slot.pid) for slot in self._board.read_slots() if slot.pid)
        if pids:
            environment = {**os.environ, "ELASTIC_CKPT_PIDS": pids}
            given = (command_of(on_notice), environment)
            threading.Thread(target=_run_command, args=given, name="asks", daemon=True).start()

    # -- the end of an incarnation ------------------------------------------------------------

    def first_failed(self, slots: list[Slot]) -> Slot:
        """Return the worker whose failure caused the others'."""
        failed = (slot for slot in slots if slot.outcome is Outcome.FAILED)
        hung = next((slot for slot in slots if slot.rank == self._hung >= 0), None)
        return hung or self._culprit or next(failed, slots[0])

    def explain(self, failed: Slot, failures: Mapping[int, Any]) -> tuple[int, str]:
        """Return the exit code and one line for a failed worker; see ``verdict.py``. Torch elastic
        recorded ``failures`` by rank: of one worker, not always this one."""
        failure = failures.get(failed.rank)
        if not failed.pid:  # no worker reached the board: torch elastic's record is all there is
            failure = next(iter(failures.values()), None)
        status, message = explain(failed, _exit_status(failed.pid), failure)
        ours = self._killed_at is not None if self._culprit is None else self._killed_before
        return status, message + BY_OTHERS * (status == -signal.SIGKILL and not ours)

    def in_background(self, template: int) -> int:
        """Return the pid of a copy of a worker that put itself into the background; 0 if none is.

        A daemon forks, ends its parent, and makes a session of its own. Other programs that the
        script has started, and DataLoader children, do not count.
        """
        limit = time.monotonic() + DAEMON_SECONDS
        workers = {slot.pid for slot in self._board.read_slots()} | {template}
        while forks := [pid for pid in copies(template) if pid not in workers]:
            for pid in forks:
                with contextlib.suppress(ProcessLookupError):
                    if os.getsid(pid) != os.getsid(template):
                        return pid
            if time.monotonic() > limit:
                break
            time.sleep(LEARN_SECONDS)
        return 0

    def log_exits(self) -> None:
        """Log how each worker ended."""
        for slot in filter(lambda slot: slot.pid, self._board.read_slots()):
            outcome = (
                slot.outcome.name.lower() if slot.outcome is not Outcome.NONE else "no outcome"
            )
            log.info(
                "rank %d ended: pid %d, %s, %s",
                slot.rank, slot.pid, exit_text(_exit_status(slot.pid)), outcome,
                extra={"rank": slot.rank},
            )  # fmt: skip

    def sweep(self, template: int) -> None:
        """Forget the workers, and kill what they left: DataLoader children, subprocesses. The
        process ``template`` stays, to fork the next ones."""
        for pidfd in self._pidfds.values():
            self._unfollow(pidfd)
        self._pidfds.clear()
        self._known.clear()
        self._culprit = self._all_left_at = self._gone_at = self._killed_at = None
        self._silent, self._warned, self._hung = False, False, -1
        self.failed_at = self.noticed_at = 0
        kill_all(
            process
            for process in descendants()
            if process.pid != template and not is_resource_tracker(process)
        )
        reap(template)
        for handle in list(WorkerProcess.started):  # torch elastic's thread may append to it
            if not handle.is_there:
                WorkerProcess.started.remove(handle)


def _run_command(command: str, environment: dict[str, str]) -> None:
    """Run the user's command that asks the script to save, and say if it fails."""
    try:  # whatever happens, the notice goes on without it
        code = subprocess.Popen(["/bin/sh", "-c", command], env=environment).wait()
        how = exit_text(code)
    except OSError as error:
        code, how = -1, str(error)
    if code:
        print_error(f"elastic-ckpt: --on-notice command:{command}: {how}; it may not have asked")


def _exit_status(pid: int, patience: float = 0.0) -> int | None:
    """Return a worker's exit status; None if it still runs after ``patience`` seconds."""
    handle = next((one for one in reversed(WorkerProcess.started) if one.pid == pid), None)
    if handle is None:
        return None
    handle.join(patience)
    return handle.exitcode


def _exited(pidfd: int) -> bool:
    poll = selectors.PollSelector()
    try:
        poll.register(pidfd, selectors.EVENT_READ)
        return bool(poll.select(0))
    finally:
        poll.close()
