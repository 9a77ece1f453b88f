"""The drainer: copies sealed generations from memory to the disk, or to the bucket that is the
job's place, while the job trains.

One generation at a time, in a thread of the lowest priority. The loop starts it and handles its
result. On a notice the copy continues in a thread of normal priority, and the newest generation
is drained first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import psutil

from elastic_ckpt.checkpoint.memory.drain import copy_share, drain, make_spare_buffers
from elastic_ckpt.checkpoint.memory.generation import Sealed
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.nodes.client import settle
from elastic_ckpt.checkpoint.nodes.copies import copy_shares
from elastic_ckpt.errors import ElasticCkptError
from elastic_ckpt.journal.events import Drained, DrainFailed
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.drain_plan import DrainPlan
from elastic_ckpt.supervisor.saves.drain_target import DrainTarget
from elastic_ckpt.util.journald import warning
from elastic_ckpt.util.progress import Advance, in_lines
from elastic_ckpt.util.text import printable

log = logging.getLogger(__name__)


@dataclass
class _Task:
    """One generation on its way."""

    sealed: Sealed
    chunks: Generator[int, None, None]
    began: float = field(default_factory=time.monotonic)
    bytes: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    polite: bool = True
    over: bool = False
    dropped: bool = False
    advance: Advance | None = None  # once the run waits for it
    shown: int = 0  # bytes of which progress was reported
    again: bool = False  # it started before the hurry: if it fails, retry at once
    error: Exception | None = None


class Drainer:
    """Not thread-safe: the supervisor's loop calls everything.

    Attributes:
        older: further tiers of this job, which earlier runs left: they are drained as well.
    """

    def __init__(
        self,
        target: DrainTarget,
        tier: MemoryTier,
        journal: Journal,
        say: Callable[[str], None],
        wake: Callable[[], None],
        token: str = "",
    ) -> None:
        """Start nothing yet. ``say`` shows one line to the user; a thread calls ``wake`` when a
        drain has ended; ``token`` is the secret of this node's memory server, on several nodes."""
        self._target = target
        self._tier = tier
        self.older: list[MemoryTier] = []
        self._journal = journal
        self._say = say
        self._wake = wake
        self._token = token
        self._task: _Task | None = None
        self._thread: threading.Thread | None = None
        self._hurried = False
        self._calm_after = False
        self._said = ""
        self._plan = DrainPlan()
        self._may_write = threading.Event()
        self._may_write.set()

    @property
    def attempt(self) -> str:
        """Identity of the attempt that is being written; empty if none is."""
        return self._task.sealed.seal.attempt if self._task else ""

    def pending(self) -> list[Sealed]:
        """Return what is in memory and not yet on disk, oldest first; nothing older than what other
        nodes keep, as this one leaves."""
        found = [one for one in self._sealed() if self.lacks(one) and not self._is_outrun(one)]
        return sorted(found, key=lambda one: one.age)

    def _is_outrun(self, one: Sealed) -> bool:
        """Return whether this node leaves, and others keep what it had of a newer one."""
        return any(newer.keeper and newer.age > one.age for newer in self._sealed())

    def lacks(self, one: Sealed) -> bool:
        """Return whether the disk lacks a generation, for all that this run knows. An earlier run's
        share of one is for the ranks to find: they alone hear from all nodes, and note it. So is a
        share whose seal does not say where the others are."""
        share, is_ours = one.seal.share, self._target.is_ours(one.seal)
        if not one.seal.is_last:
            return False
        is_found = share is not None and bool(self._token) and share.token == self._token
        return (is_ours or is_found) and not one.settled and self._plan.is_pending(one.seal.attempt)

    @property
    def over(self) -> bool:
        """Whether no drain is running, and all that is left has just failed."""
        return self._task is None and not self._due()

    def adopt(self) -> list[Sealed]:
        """Return what earlier runs left to be drained; a checkpoint that was on disk and was
        deleted there since must not come back."""
        for one in self._sealed():
            if self._target.tier(one.seal).holds(one.seal):
                one.generation.settle(one.seal)
            elif one.settled:
                one.generation.clear()
        return self.pending()

    def bytes_left(self, one: Sealed) -> int:
        """Return the bytes of a generation that are not copied yet."""
        task = self._task
        is_running = task is not None and task.sealed.seal.attempt == one.seal.attempt
        done = task.bytes if task is not None and is_running and not task.dropped else 0
        return max(0, one.seal.total_bytes - done)

    def _sealed(self) -> list[Sealed]:
        return [one for tier in (self._tier, *self.older) for one in tier.sealed()]

    def serve(self, *, sealed: bool) -> None:
        """Handle a drain that ended, and start the next one that is due. A worker may have
        ``sealed`` something since the last call."""
        task = self._task
        if task is not None and self._hurried and not task.over:
            self._show(task)
        if sealed and not self._may_write.is_set():
            self.hurry()  # the last step was due for a save anyway, and they do not make two of it
        if task is not None and task.over:
            self._task = None
            if not task.dropped:
                self._tell(task)
            if self._calm_after:
                self.calm()
            sealed = True
        if sealed or self._plan.has_retry(time.monotonic()):
            self._look()

    def _show(self, task: _Task) -> None:
        """Show progress, if it takes long: a hurried drain is waited for."""
        if task.advance is None:
            seal = task.sealed.seal
            task.advance = in_lines(self._say)(
                f"bringing step {seal.step} from memory to {self._target.name}", seal.total_bytes
            )
        count = task.bytes - task.shown
        task.shown += count
        task.advance(count)

    def _look(self) -> None:
        due = self._due()
        if self._task is not None:
            if self._is_outrun(self._task.sealed):
                self._task.dropped = True
            elif due and due[-1].age > self._task.sealed.age:
                # No generation is free, and the next save would go to the disk: no time to wait.
                self._speed_up()
                # In a hurry the newest counts; this one restarts after it.
                self._task.dropped = self._hurried
            return
        if due and self._may_write.is_set():
            chosen = due[-1] if self._hurried else due[0]
            self._plan.begin(chosen.seal.attempt)
            self._begin(chosen)

    def hold(self) -> None:
        """Leave the disk to the ranks until :meth:`hurry`: pause the copy, start no drain."""
        self._may_write.clear()

    def hurry(self) -> None:
        """Drain at normal priority from now on, the newest first; retry what failed."""
        self._may_write.set()
        self._plan.retry_all()
        if self._task is not None:
            self._task.again = True
        self._hurried = True
        self._speed_up()
        self._look()

    def hurry_once(self) -> None:
        """As :meth:`hurry`, until one drain is done."""
        self._calm_after = not self._hurried
        self.hurry()

    def calm(self) -> None:
        """Run the next drain at the lowest priority again."""
        self._hurried = self._calm_after = False

    def finish_pruning(self, hurry: Callable[[], bool]) -> None:
        """Wait for the deletion of old checkpoints until ``hurry`` returns True."""
        self._target.finish_pruning(hurry)

    def _due(self) -> list[Sealed]:
        now = time.monotonic()
        return [one for one in self.pending() if self._plan.is_due(one.seal.attempt, now)]

    def _begin(self, sealed: Sealed) -> None:
        self._target.begin(sealed.seal)
        copy = copy_shares if sealed.seal.others else copy_share
        chunks = drain(sealed, self._target.tier(sealed.seal), copy)
        self._task = _Task(sealed, chunks, polite=not self._hurried)
        self._start(self._task, None)

    def _speed_up(self) -> None:
        """Continue at normal priority, in another thread: only root may lower a niceness."""
        if self._task is not None and self._task.polite:
            self._task.polite = False
            self._start(self._task, self._thread)

    def _start(self, task: _Task, before: threading.Thread | None) -> None:
        self._thread = threading.Thread(
            target=self._work, args=(task, before, task.polite), name="drain", daemon=True
        )
        self._thread.start()

    def _work(self, task: _Task, before: threading.Thread | None, polite: bool) -> None:
        if before is not None:
            before.join()  # no more than a chunk
        if task.over:
            return
        if polite:
            be_polite()
        began = time.thread_time()
        try:
            for count in task.chunks:
                task.bytes += count
                if task.dropped:
                    task.chunks.close()
                    break
                self._may_write.wait()  # a daemon thread: it does not keep the process alive
                if polite and not task.polite:
                    return
            else:
                self._settle(task.sealed)
                task.dropped = False  # it was done before it could be
                task.seconds = time.monotonic() - task.began
                if polite:
                    make_spare_buffers(self._tier, task.sealed)
        except Exception as error:  # the loop reports it, whatever it is
            task.error = error
            task.seconds = time.monotonic() - task.began
        finally:
            task.cpu_seconds += time.thread_time() - began
        task.over = True
        self._wake()

    def _settle(self, sealed: Sealed) -> None:
        if self._target.has(sealed.seal):
            sealed.generation.settle(sealed.seal)
            settle(sealed.seal.others, sealed.seal.attempt)
            return
        sealed.generation.clear()  # another run has gone past it, and it was superseded

    def _give_up_lost(self) -> None:
        """Let shares be overwritten whose other nodes are gone, once there is a newer one."""
        with contextlib.suppress(OSError, ElasticCkptError):  # it is tried again behind the next
            for one in self._tier.sealed():
                if one.seal.share is not None and self._plan.has_failed(one.seal.attempt):
                    newest = self._target.tier(one.seal).newest()
                    if newest is not None and newest.key > one.key:
                        one.generation.settle(one.seal)

    def _tell(self, task: _Task) -> None:
        seal, error, seconds = task.sealed.seal, task.error, task.seconds
        log.info(
            "step %d to %s: %s, %.3f s", seal.step, self._target.name, error or "done", seconds
        )
        if error is None:
            self._plan.done(seal.attempt, [one.seal.attempt for one in self._sealed()])
            self._journal.write(
                Drained(
                    path=self._target.drained(seal),
                    step=seal.step,
                    bytes=task.bytes,
                    seconds=seconds,
                    cpu_seconds=task.cpu_seconds,
                )
            )
            self._give_up_lost()
            return
        self._plan.failed(seal.attempt, time.monotonic(), again=task.again)
        why = printable(str(error)) or type(error).__name__
        self._give_up_lost()
        self._journal.write(DrainFailed(step=seal.step, seconds=seconds, error=why))
        if why != self._said:
            self._said = why
            kept = (
                "stays in memory, it" if task.sealed.generation.slot.exists() else "was deleted and"
            )
            self._say(
                warning(f"step {seal.step} {kept} cannot be written to {self._target.name}: {why}")
            )


def be_polite() -> None:
    """Give this thread the lowest CPU and I/O priority."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, 19)
    with contextlib.suppress(psutil.Error, OSError, AttributeError):
        psutil.Process(thread).ionice(psutil.IOPRIO_CLASS_IDLE)
