"""How a run ends: when what is in memory is on the disk, and with which code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elastic_ckpt.checkpoint.catalog import CheckpointView, newest_intact
from elastic_ckpt.checkpoint.memory.tier import Sealed
from elastic_ckpt.errors import ExitCode
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.protocol.run_state import Event
from elastic_ckpt.supervisor.run_record import Account
from elastic_ckpt.supervisor.saves.memory_keeper import NOTHING, MemoryKeeper


class Ending:
    """Each way to end but ``preempt_now`` waits until :meth:`serve` finds the memory tier done."""

    def __init__(self, job: JobDirectory, memory: MemoryKeeper, account: Account) -> None:
        self._job = job
        self._memory = memory
        self._account = account
        self._before_notice = NOTHING
        self._then: Callable[[], None] | None = None

    @property
    def is_decided(self) -> bool:
        """Whether the job is over, and only the memory tier is waited for."""
        return self._then is not None

    def noticed(self) -> None:
        """A notice has come: what the disk gets from now on counts as saved."""
        self._before_notice = self._disk_key()

    def serve(self) -> None:
        """End the run if all that the memory tier holds is on the disk, or cannot get there."""
        if self._then is not None and self._memory.over:
            then, self._then = self._then, None
            then()

    def finish(self, hurry: Callable[[], bool]) -> None:
        """The work is done: 0, unless the disk lacks its last checkpoint.

        Args:
            hurry: asked while old checkpoints are deleted; True leaves them.
        """

        def end() -> None:
            kept = self._only_in_memory()
            if kept is not None:
                why = f"{_where(kept)}: mend the storage and run again, on this node"
                self._end(Event.GIVE_UP, ExitCode.FAILED, f"the work is done, but {why}")
                return
            self._memory.finish_pruning(hurry)
            self._end(Event.COMPLETED, ExitCode.FINISHED, "finished")

        self._when_on_disk(end)

    def give_up(self, code: ExitCode, message: str) -> None:
        """No restart mends it."""

        def end() -> None:
            kept = self._only_in_memory()
            self._end(Event.GIVE_UP, code, message + (f"; {_where(kept)}" if kept else ""))

        self._when_on_disk(end)

    def preempt(
        self, event: Event, detail: str, *, stopped: bool = False, begun: bool = True
    ) -> None:
        """The ranks have gone on a notice; as :meth:`preempt_now`."""
        self._when_on_disk(lambda: self.preempt_now(event, detail, stopped=stopped, begun=begun))

    def preempt_now(
        self, event: Event, detail: str, *, stopped: bool = False, begun: bool = True
    ) -> None:
        """End on a notice, with 75 if what has been done is on the disk, else with 76.

        Args:
            stopped: the ranks left at the agreed step, where a checkpoint stands.
            begun: a step was begun since the ranks resumed; if not, the old checkpoint counts.
        """
        self._then = None
        newest, kept = self._newest(), self._only_in_memory()
        new = self._disk_key() > self._before_notice
        saved = kept is None and (new or (newest is not None and (stopped or not begun)))
        what = "preempted, saved" if saved else "preempted without a new checkpoint"
        step = f" (newest intact: step {newest.step})" if newest else ""
        self._end(
            event,
            ExitCode.PREEMPTED_SAVED if saved else ExitCode.PREEMPTED_UNSAVED,
            f"{what}: {detail}{step}" + (f"; {_where(kept)}" if kept else ""),
            preemptions=self._account.record.preemptions + 1,
        )

    def newest_key(self) -> tuple[int, int]:
        """(epoch, step) of what a restart would take, from either tier."""
        return max(self._disk_key(), self._memory.newest_key())

    # -- inside -------------------------------------------------------------------------------

    def _when_on_disk(self, then: Callable[[], None]) -> None:
        self._then = then
        self._memory.hurry()
        if not self._memory.over:
            self._account.update(message="bringing the newest checkpoint from memory to the disk")
        self._memory.serve()
        self.serve()

    def _end(self, event: Event, code: ExitCode, message: str, **changes: Any) -> None:
        self._account.move(event, message, exit_code=int(code), **changes)

    def _only_in_memory(self) -> Sealed | None:
        """What would be lost with this machine: newer than all that the disk has."""
        kept = self._memory.not_on_disk()
        return kept if kept is not None and kept.key > self._disk_key() else None

    def _disk_key(self) -> tuple[int, int]:
        newest = self._newest()
        return (newest.epoch, newest.step) if newest else NOTHING

    def _newest(self) -> CheckpointView | None:
        """The newest on disk that is intact; None too if the disk does not answer now.

        That is no reason to take down a job which trains, or to miss its stop.
        """
        try:
            return newest_intact(self._job)
        except OSError:
            return None


def _where(kept: Sealed) -> str:
    """What becomes of a checkpoint that did not get to the disk."""
    return f"step {kept.seal.step} is in memory only, in {kept.generation.slot}"
