"""Watches this node's workers as processes: which run, which failed first, and ends the rest."""

from __future__ import annotations

import logging
import os
import selectors
import signal
import time
from collections.abc import Mapping
from typing import Any, Final

from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Outcome, Slot
from elastic_ckpt.supervisor.agent.launch import WorkerProcess
from elastic_ckpt.supervisor.agent.verdict import exit_text, explain, signal_name
from elastic_ckpt.util.processes import descendants, is_resource_tracker, kill_all, reap

log = logging.getLogger(__name__)

LEARN_SECONDS: Final = 0.02
"""Interval at which to look for new workers; the kernel reports the end of known ones."""

LINGER_SECONDS: Final = 10.0
"""Time for workers to exit after the last of them has posted its outcome."""


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
        self._woken_at = 0
        self._all_left_at: float | None = None

    def patience(self) -> float:
        """Return the seconds after which to call :meth:`watch` again without an event."""
        return LEARN_SECONDS if len(self._known) < self._board.slots else 1.0

    @property
    def left_well(self) -> bool:
        """Whether every worker started, posted an outcome, did not fail, and is gone."""
        outcomes = {slot.outcome for slot in self._board.read_slots()}
        gone = len(self._known) == self._board.slots and not self._pidfds
        return gone and not {Outcome.NONE, Outcome.FAILED} & outcomes

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
        self._end_lingering()

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
        elif time.monotonic() > self._all_left_at + LINGER_SECONDS:
            self._lost([])  # find the first failure before the kill
            self.kill()

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
        slots = self._board.read_slots()
        died = [slots[rank] for rank in exited if slots[rank].outcome is Outcome.NONE]
        failed = [slot for slot in slots if slot.outcome is Outcome.FAILED]
        if not died and not failed:
            return
        self._culprit = died[0] if died else min(failed, key=lambda slot: slot.left)
        self.failed_at = self._culprit.left or self._woken_at
        self._board.abort(self._board.flag)
        self.kill()
        self.noticed_at = time.monotonic_ns()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to every worker."""
        sent = [
            process.pid for process in list(WorkerProcess.started) if process.send_signal(number)
        ]
        if sent:
            log.info("sent %s to %s", signal_name(number), sent)

    # -- the end of an incarnation ------------------------------------------------------------

    def first_failed(self, slots: list[Slot]) -> Slot:
        """Return the worker whose failure caused the others'."""
        failed = (slot for slot in slots if slot.outcome is Outcome.FAILED)
        return self._culprit or next(failed, slots[0])

    def explain(self, failed: Slot, failures: Mapping[int, Any]) -> tuple[int, str]:
        """Return the exit code and one line for a failed worker; see ``verdict.py``. Torch elastic
        recorded ``failures`` by rank: of one worker, not always this one."""
        failure = failures.get(failed.rank)
        if not failed.pid:  # no worker reached the board: torch elastic's record is all there is
            failure = next(iter(failures.values()), None)
        return explain(failed, _exit_status(failed.pid), failure)

    def log_exits(self) -> None:
        """Log how each worker ended; only after torch elastic has returned."""
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
        self._culprit = self._all_left_at = None
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


def _exit_status(pid: int) -> int | None:
    """Return a worker's exit status; None while torch elastic has not collected it."""
    handle = next((one for one in reversed(WorkerProcess.started) if one.pid == pid), None)
    return handle.exitcode if handle is not None else None


def _exited(pidfd: int) -> bool:
    poll = selectors.PollSelector()
    try:
        poll.register(pidfd, selectors.EVENT_READ)
        return bool(poll.select(0))
    finally:
        poll.close()
