"""How a run ends: when what is in memory is on the disk, and with which exit code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from elastic_ckpt.checkpoint.memory.generation import Sealed
from elastic_ckpt.errors import ExitCode
from elastic_ckpt.protocol.run_state import Event
from elastic_ckpt.supervisor.ports import NO_CHECKPOINT, Key, Ports
from elastic_ckpt.supervisor.run_record import RunRecord

SCAN_SECONDS: Final = 5.0
"""How long the disk may take to say what its newest checkpoint is, if no deadline is near."""


class Shutdown:
    """Every way to end but ``preempt_now`` waits until the memory tier is drained or has failed."""

    def __init__(
        self,
        ports: Ports,
        record: RunRecord,
        patience: Callable[[float, bool], Callable[[], float]],
    ) -> None:
        """``patience`` returns what says how long a wait may still take, given how long it should
        at most, and whether the run ends after it."""
        self._directory, self._memory, self._own = ports.directory, ports.memory, ports.own
        self._mirror = ports.mirror
        self._board = ports.board
        self._record = record
        self._patience = patience
        self._before_notice = NO_CHECKPOINT
        self._saved_before = -1
        self._followed: str | None = None
        self._then: Callable[[], None] | None = None
        self._is_done = False
        self._flushes = False
        self._waits_for_head = False

    @property
    def is_decided(self) -> bool:
        """Whether the job is over, and only the memory tier is waited for."""
        return self._then is not None

    def notice_arrived(self, saved_step: int) -> None:
        """Count what the disk gets from now on as saved because of the notice; reads no disk.

        Args:
            saved_step: the newest that a rank has saved, in whichever tier; -1 for none.
        """
        self._own.mark()
        self._before_notice, self._saved_before = self._directory.newest(), -1
        kept = self._memory.not_on_disk()
        # The last scan may be older than the last drain, or the last save to the disk.
        if kept is None:
            self._before_notice = max(self._before_notice, self._memory.newest_key())
        if kept is None or kept.age[-1] != saved_step:
            self._saved_before = saved_step

    def work_is_done(self) -> None:
        """Count the job as done: its ranks had finished when they were to be stopped."""
        self._is_done = True

    def follow(self, identity: str) -> None:
        """Count what the disk gets as saved only while this run of another node owns the job.

        Args:
            identity: of that run; empty as long as the directory has not confirmed it.
        """
        self._followed = identity

    def serve(self) -> None:
        """End the run if all that the memory tier holds is on the disk, or cannot get there."""
        if self._then is None or not self._memory.over or not self._own.settled or self._is_owed():
            return
        if not self._flushes:
            self._flushes = True
            self._mirror.flush()
        if self._mirror.flushed:
            then, self._then = self._then, None
            then()

    def finish(self, hurry: Callable[[], bool], note: str = "") -> None:
        """End a run whose work is done: with 0, unless the disk lacks its last checkpoint.

        Args:
            hurry: called while old checkpoints are deleted; True leaves them.
            note: what the work left unsaved by itself; may be empty.
        """

        def end() -> None:
            key = self._on_disk()
            if self._directory.lost:  # it may have gone back to an older checkpoint
                self.lose(self._directory.lost)
                return
            if not self._is_still_followed():
                self._end_unconfirmed()
                return
            kept = self._only_in_memory(key)
            if kept is not None:
                why = f"{_where(kept)}: fix the storage, then rerun the same command on this node"
                self._end(Event.GIVE_UP, ExitCode.FAILED, f"the work is done, but {why}")
                return
            if self._mirror.lacks:
                why = f"{self._mirror.lacks}; rerun the same command on this node"
                self._end(Event.GIVE_UP, ExitCode.FAILED, f"the work is done, but {why}")
                return
            self._memory.finish_pruning(hurry)
            message = f"finished, but {note}" if note else "finished"
            self._end(Event.COMPLETED, ExitCode.FINISHED, message)

        self._is_done = self._waits_for_head = True
        self._when_on_disk(end)

    def give_up(self, code: ExitCode, message: str) -> None:
        """End a run that no restart fixes."""

        def end() -> None:
            kept = self._only_in_memory(self._on_disk())
            self._end(Event.GIVE_UP, code, message + (f"; {_where(kept)}" if kept else ""))

        self._when_on_disk(end)

    def preempt(
        self, event: Event, detail: str, *, stopped: bool = False, stepped: bool = True
    ) -> None:
        """End on a notice once the memory tier is drained; arguments as in :meth:`preempt_now`."""
        self._waits_for_head = True
        self._when_on_disk(
            lambda: self.preempt_now(event, detail, stopped=stopped, stepped=stepped)
        )

    def preempt_now(
        self, event: Event, detail: str, *, stopped: bool = False, stepped: bool = True
    ) -> None:
        """End on a notice, with 75 if all finished work is on the disk, else with 76.

        A job whose work is done ends with 0 even so, if the disk has its last checkpoint.

        Args:
            stopped: the ranks left together at the agreed step, where they saved.
            stepped: a step was begun since the ranks resumed; if not, the old checkpoint counts.
        """
        self._then = None
        key = self._on_disk()
        if self._directory.lost:  # what the disk has is another run's
            self.lose(self._directory.lost)
            return
        kept = self._only_in_memory(key)
        is_there = key is not None and kept is None  # only older ones are not drained
        if self._is_done and is_there and not self._mirror.lacks and self._is_still_followed():
            self._end(Event.COMPLETED, ExitCode.FINISHED, "finished")
            return
        there = key is not None and key > NO_CHECKPOINT
        before = max(self._before_notice, self._own.newest_marked())
        new = key is not None and key > before and key[-1] != self._saved_before
        peer = self._kept_by_peer(key)
        others = (new or bool(peer)) and not self._is_still_followed()
        new = new and not others
        at_peer = bool(peer) and not others
        on_disk = not peer and (new or (there and (stopped or not stepped)))
        saved = kept is None and (at_peer or on_disk)
        lacks = self._mirror.lacks if saved else ""
        saved = saved and not lacks
        # Rerun in the directory that is there now, the job would begin anew.
        if not saved and (gone := self.gone(NO_CHECKPOINT if key is None else key)):
            held = f"; {_where(kept)}" if kept else ""
            self._end(Event.GIVE_UP, ExitCode.UNAVAILABLE, f"{gone}; preempted: {detail}{held}")
            return
        what = "preempted, saved" if saved else "preempted without a new checkpoint"
        name = self._own.newest_name or (f"step {key[-1]}" if key else "")
        step = f" (newest intact: {name})" if there else ""
        silent = (
            f"; {lacks}" if lacks else "" if key is not None else "; the storage does not answer"
        )
        if others and not saved:
            silent = ", which another run may have saved"
        elif peer:
            step = f" ({peer})"
        self._end(
            event,
            ExitCode.PREEMPTED_SAVED if saved else ExitCode.PREEMPTED_UNSAVED,
            f"{what}: {detail}{step}{silent}" + (f"; {_where(kept)}" if kept else ""),
            preemptions=self._record.node.preemptions + 1,
        )

    def lose(self, by: str) -> None:
        """End a run that owns the job no longer; what is in memory stays there.

        Args:
            by: one line on who has taken it over.
        """
        self._then = None
        self._end(Event.GIVE_UP, ExitCode.UNAVAILABLE, by)

    def gone(self, newest: Key | None = None) -> str:
        """Return why a start from ``newest``, by default the newest of either tier, would repeat
        saved work; empty if it would not.

        It would if the directory was taken away, and what the ranks had saved went with it.
        """
        if self._directory.left_behind is None:
            return ""
        if newest is None:
            newest = self.newest_key()
        left_behind = self._directory.left_behind
        if left_behind is None:  # it came back
            return ""
        # The last scan may be older than the last save.
        saved = max((slot.saved_step for slot in self._board.read_slots()), default=-1)
        if newest >= left_behind and newest[-1] >= saved:
            return ""
        in_memory = self._memory.newest_key()[-1]
        there = left_behind[-1] if in_memory >= saved else max(left_behind[-1], saved)
        return (
            f"the checkpoint of step {there} is not there any more, because the directory was "
            "moved, deleted or unmounted: put it back"
        )

    def newest_key(self) -> Key:
        """Return the newest checkpoint of either tier; waits for a scan, bounded."""
        on_disk = self._on_disk(ends=False)
        known = self._directory.newest() if on_disk is None else on_disk
        return max(known, self._memory.newest_key())

    def _when_on_disk(self, then: Callable[[], None]) -> None:
        self._then = then
        self._memory.hurry()
        if self._is_owed():
            self._directory.scan()  # what its ranks saved last may be there, and newer
        if not self._memory.over:
            self._record.update(message="bringing the newest checkpoint from memory to the disk")
        self._memory.serve()
        self.serve()

    def _end(self, event: Event, code: ExitCode, message: str, **changes: Any) -> None:
        self._record.move(event, message, exit_code=int(code), **changes)

    def _on_disk(self, *, ends: bool = True) -> Key | None:
        """Return the newest intact checkpoint on disk; None if the storage does not answer."""
        return self._directory.scan_now(self._patience(SCAN_SECONDS, ends))

    def _is_still_followed(self) -> bool:
        """Return whether the run that this node has joined owns the job; waits, bounded."""
        if self._followed is None:
            return True
        left = self._patience(SCAN_SECONDS, True)
        known = self._directory.known_identities(left()) if self._followed else None
        return known is not None and known[:1] == (self._followed,)

    def _end_unconfirmed(self) -> None:
        """End a node that leaves, and whose ranks had finished: another run may own the job, and
        have gone back to an older checkpoint."""
        self._end(
            Event.STOPPED,
            ExitCode.PREEMPTED_UNSAVED,
            "preempted: its ranks had finished, but the directory does not confirm that the run "
            "of its head still owns the job",
            preemptions=self._record.node.preemptions + 1,
        )

    def _only_in_memory(self, on_disk: Key | None) -> Sealed | None:
        """Return what would be lost with this machine: newer than all that the disk has."""
        kept = self._memory.not_on_disk() or self._memory.owed()
        known = NO_CHECKPOINT if on_disk is None else on_disk
        return kept if kept is not None and kept.age > known else None

    def _is_owed(self) -> bool:
        """Return whether the head has yet to bring to the disk what would go with this node."""
        return self._waits_for_head and self._only_in_memory(self._directory.newest()) is not None

    def _kept_by_peer(self, on_disk: Key | None) -> str:
        """Return where the work is that nodes that stay keep for this one, which may leave; empty
        if they do not, or the disk has it by now."""
        kept = self._memory.kept_by_peer()
        if kept is None or kept[0] <= (NO_CHECKPOINT if on_disk is None else on_disk):
            return ""
        return (
            f"step {kept[0][-1]} is in the memory of the nodes that stay, what this one had on "
            f"{kept[1]}: they bring it to the disk"
        )


def _where(kept: Sealed) -> str:
    """Return where a checkpoint is that did not get to the disk."""
    return f"step {kept.seal.step} is in memory only, in {kept.generation.slot}"
