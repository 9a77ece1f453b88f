"""Follows a recovery to its end, the first step of the new incarnation, and journals it."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_ckpt.jobdir.node_record import RecoveryRecord
from elastic_ckpt.journal.events import RecoveryMeasured
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Slot
from elastic_ckpt.protocol.start_marks import breakdown


class RecoveryWatch:
    """The recoveries of one node, one after the other; ``last`` is the newest complete one."""

    def __init__(self, board: Board, journal: Journal, last: RecoveryRecord | None) -> None:
        self.last = last
        self._board = board
        self._journal = journal
        self._failure: tuple[int, int, int] | None = None  # failed, noticed, gone

    def failed(self, failed_at: int, noticed_at: int, gone_at: int) -> None:
        """Note that an incarnation has failed; times are monotonic nanoseconds. A failure during a
        recovery is part of the recovery that it delays."""
        if self._failure is None:
            self._failure = failed_at, noticed_at, gone_at

    def poll(self, incarnation: int) -> bool:
        """Return whether a recovery has just completed; if so it has been journaled."""
        failure = self._failure
        if failure is None or self._board.incarnation != incarnation:
            return False
        slots = self._board.read_slots()
        # A mark from before the failure is of the incarnation that failed.
        if not all(slot.marks.stepped > failure[-1] for slot in slots):
            return False
        self._failure = None
        self.last = _record(incarnation, failure, slots)
        self._journal.write(
            RecoveryMeasured(
                incarnation=incarnation,
                total=self.last.total_seconds,
                stages=self.last.stages,
                step=self.last.step,
                tier=self.last.tier,
            )
        )
        return True


def _record(
    incarnation: int, failure: tuple[int, int, int], slots: Sequence[Slot]
) -> RecoveryRecord:
    found = breakdown(*failure, [slot.marks for slot in slots])
    return RecoveryRecord(
        incarnation=incarnation,
        total_seconds=found.total,
        stages=found.stages,
        step=max(0, *(slot.start_step for slot in slots)),
        tier=max(slot.source for slot in slots).name.lower(),
    )
