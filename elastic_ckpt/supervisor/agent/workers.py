"""The workers of this node as processes: who is there, who went first, and an end to the rest."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import selectors
import signal
import time
from multiprocessing import forkserver
from typing import Any, Final

from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Outcome, Slot
from elastic_ckpt.util.processes import (
    children_of,
    descendants,
    is_resource_tracker,
    kill_all,
    reap,
)

log = logging.getLogger(__name__)

LEARN_SECONDS: Final = 0.02
"""How often to look for workers that have just started; from then on the kernel tells."""

LINGER_SECONDS: Final = 10.0
"""How long workers may take to exit once all of them have said how they left."""


class Workers:
    """Watches one incarnation's workers after the other; used by the agent's main thread."""

    def __init__(self, board: Board, selector: selectors.BaseSelector) -> None:
        """
        Args:
            selector: gets a pidfd per worker, so that a death ends the agent's wait.
        """
        self._board = board
        self._selector = selector
        self._known: set[int] = set()  # local ranks whose pid is known
        self._pidfds: dict[int, int] = {}  # local rank -> pidfd, while the worker lives
        self._processes: dict[int, Any] = {}  # pid -> torch elastic's handle of the worker
        self._culprit: Slot | None = None
        self._woken_at = 0
        self.failed_at = self.noticed_at = 0  # of the first failure; see messages.Ended
        self._all_said_at: float | None = None

    def patience(self) -> float:
        """Seconds after which to :meth:`watch` again, whatever happens."""
        return LEARN_SECONDS if len(self._known) < self._board.slots else 1.0

    @property
    def left_well(self) -> bool:
        """Whether every worker came, said how it left, did not fail, and is gone."""
        said = [slot.outcome for slot in self._board.read_slots()]
        gone = len(self._known) == self._board.slots and not self._pidfds
        return gone and not {Outcome.NONE, Outcome.FAILED} & set(said)

    @property
    def any_left(self) -> bool:
        """Whether a worker's process is there."""
        return bool(children_of(_forkserver_pid()))

    def watch(self) -> None:
        """Learn of new workers; on the first one that died without a word, kill the others.

        Torch elastic would send SIGTERM and wait 30 s for ranks that are stuck in a collective.
        """
        self._woken_at = time.monotonic_ns()
        for slot in self._board.read_slots():
            if slot.pid and slot.local_rank not in self._known:
                self._follow(slot)
        exited = [local_rank for local_rank, pidfd in self._pidfds.items() if _exited(pidfd)]
        for local_rank in exited:
            pidfd = self._pidfds.pop(local_rank)
            self._selector.unregister(pidfd)
            os.close(pidfd)
        if exited:
            self._lost(exited)
        self._end_lingering()

    def _end_lingering(self) -> None:
        """A worker whose work is sealed must not use up the notice in its own clean-up.

        Nor may one that failed, but is kept by a thread of its own, keep the others waiting.
        """
        said = [slot.outcome for slot in self._board.read_slots()]
        over = Outcome.FAILED in said or Outcome.NONE not in said
        if not over:
            self._all_said_at = None
        elif self._all_said_at is None:
            self._all_said_at = time.monotonic()
        elif time.monotonic() > self._all_said_at + LINGER_SECONDS:
            self._lost([])  # who failed is known before the others are killed
            self.kill()

    def _follow(self, slot: Slot) -> None:
        self._known.add(slot.local_rank)
        log.info("rank %d runs: pid %d", slot.rank, slot.pid, extra={"rank": slot.rank})
        self._remember_processes()
        try:
            pidfd = os.pidfd_open(slot.pid)
        except ProcessLookupError:
            self._lost([slot.local_rank])
            return
        self._pidfds[slot.local_rank] = pidfd
        self._selector.register(pidfd, selectors.EVENT_READ)

    def _remember_processes(self) -> None:
        """Keep the handles of the workers, which alone know every one's exit code.

        They are asked when torch elastic has returned: two threads must not poll one of them.
        Torch elastic itself reports one worker, and not the one that was first.
        """
        children: Any = multiprocessing.process
        for process in list(children._children):
            with contextlib.suppress(ValueError):  # closed meanwhile
                self._processes[process.pid] = process

    def _lost(self, exited: list[int]) -> None:
        """Workers are gone; if one of them failed, find the first that did, and kill the rest.

        One that left without a word went before those that could say that they failed: they
        did so because it was gone.
        """
        if self._culprit is not None:
            return
        slots = self._board.read_slots()
        silent = [slots[rank] for rank in exited if slots[rank].outcome is Outcome.NONE]
        failed = [slot for slot in slots if slot.outcome is Outcome.FAILED]
        if not silent and not failed:
            return
        self._culprit = silent[0] if silent else min(failed, key=lambda slot: slot.left)
        self.failed_at = self._culprit.left or self._woken_at
        self._remember_processes()
        self._board.abort(self._board.flag)
        self.kill()
        self.noticed_at = time.monotonic_ns()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to every worker."""
        if number == signal.SIGKILL:  # at once where it can be, before all processes are searched
            for pidfd in self._pidfds.values():
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, number)
        sent = []
        for process in children_of(_forkserver_pid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
                sent.append(process.pid)
        if sent:
            log.info("sent %s to %s", _signal_name(number), sent)

    # -- the end of an incarnation ------------------------------------------------------------

    def first_failed(self, slots: list[Slot]) -> Slot:
        """The worker whose failure the others' followed from."""
        failed = (slot for slot in slots if slot.outcome is Outcome.FAILED)
        return self._culprit or next(failed, slots[0])

    def explain(self, failed: Slot, error: BaseException | None) -> tuple[int, str]:
        """Exit code and one line for a worker that failed; exit codes below 0 are signals.

        Args:
            error: what torch elastic raised; it names one worker, not always this one.
        """
        if failed.outcome is Outcome.FAILED:
            return failed.exit_code, failed.reason or f"exit code {failed.exit_code}"
        failures: dict[int, Any] = getattr(error, "failures", {})
        failure = failures.get(failed.rank)
        if not failed.pid:  # no worker came as far as the board: what torch elastic says is all
            failure = next(iter(failures.values()), None)
        process = self._processes.get(failed.pid)
        status: int | None = process.exitcode if process is not None else None
        if status is None and failure is not None:
            status = int(failure.exitcode)
        if status is None or status == 255:  # 255: its template died with the exit status
            status = -int(signal.SIGKILL)
        if status < 0:
            return status, _how(status)
        if status == 0:
            return 0, "it left with exit code 0 before the script came to its end"
        return status, _said(failure) or _how(status)

    def tell_exits(self) -> None:
        """Log how each worker ended; when torch elastic has returned."""
        for slot in filter(lambda slot: slot.pid, self._board.read_slots()):
            process = self._processes.get(slot.pid)
            status: int | None = process.exitcode if process is not None else None
            said = slot.outcome.name.lower() if slot.outcome is not Outcome.NONE else "no word"
            log.info(
                "rank %d ended: pid %d, %s, %s", slot.rank, slot.pid, _how(status), said,
                extra={"rank": slot.rank},
            )  # fmt: skip

    def sweep(self) -> None:
        """Forget the workers, and kill what they left: DataLoader children, subprocesses."""
        for pidfd in self._pidfds.values():
            self._selector.unregister(pidfd)
            os.close(pidfd)
        self._pidfds.clear()
        self._known.clear()
        self._processes.clear()
        self._culprit = self._all_said_at = None
        self.failed_at = self.noticed_at = 0
        keep = _forkserver_pid()
        kill_all(
            process
            for process in descendants()
            if process.pid != keep and not is_resource_tracker(process)
        )
        reap(keep)


def _said(failure: Any) -> str:
    """What torch elastic recorded of an exception before the script; empty if nothing."""
    record = getattr(failure, "error_file_data", {}).get("message", {})
    text = record.get("message", "") if isinstance(record, dict) else ""
    lines = str(text).strip().splitlines()
    return lines[0] if lines else ""


def _how(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "exit status unknown"
    return f"killed by {_signal_name(-status)}" if status < 0 else f"exit code {status}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _exited(pidfd: int) -> bool:
    poll = selectors.PollSelector()
    try:
        poll.register(pidfd, selectors.EVENT_READ)
        return bool(poll.select(0))
    finally:
        poll.close()


def _forkserver_pid() -> int:
    # No public name; without it workers could not be told from other descendants.
    return getattr(forkserver._forkserver, "_forkserver_pid", None) or -1
