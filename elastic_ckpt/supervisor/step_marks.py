"""Tells the journal where the training is, and which step its ranks agreed upon."""

from __future__ import annotations

import time
from typing import Final

from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Slot

RAREST_SECONDS: Final = 30.0
OFTENEST_SECONDS: Final = 1.0
_SHARE: Final = 1 / 20
"""Marks are a twentieth of an incarnation's age apart, between the two above: a short run has some,
and a long one no more than 2,880 a day."""


class StepMarks:
    """One node's; the supervisor's loop calls :meth:`look` at each of its turns."""

    def __init__(self, board: Board, journal: Journal) -> None:
        self._board = board
        self._journal = journal
        self.begin()

    def begin(self) -> None:
        """Another incarnation is about to be launched."""
        self._began = self._next = 0.0
        self._step = -1
        self._answered = 0

    def look(self, now: float) -> None:
        """Write what is due; ``now`` is monotonic seconds."""
        self._look_at_answers()
        if now < self._next:
            return
        slot = self._slowest()
        if slot is None:
            return
        self._began = self._began or slot.first_entry / 1e9
        self._mark(slot)
        age = now - self._began
        self._next = now + min(RAREST_SECONDS, max(OFTENEST_SECONDS, _SHARE * age))

    def last(self) -> None:
        """The incarnation is over: where it was."""
        self._look_at_answers()
        slot = self._slowest()
        if slot is not None:
            self._mark(slot)

    def _slowest(self) -> Slot | None:
        """The rank that is behind all others, of those that train."""
        begun = [slot for slot in self._board.read_slots() if slot.first_entry and slot.attached]
        return min(begun, key=lambda slot: slot.finished, default=None)

    def _mark(self, slot: Slot) -> None:
        if slot.finished <= self._step:
            return
        self._step = slot.finished
        # What rank 0 reports counts, and it is the first of the node that leads.
        self._journal.note(
            "steps",
            step=slot.shown_step,
            epoch=slot.epoch,
            sample_start_index=slot.sample_start_index,
            samples_per_step=slot.samples_per_step,
            total_steps=slot.total_steps,
            age_seconds=time.monotonic() - slot.beat / 1e9,
            metrics=self._board.read_slot(0).metrics,
        )

    def _look_at_answers(self) -> None:
        """The agreement's results: a few numbers in shared memory."""
        for number, answer in sorted(self._board.answers().items()):
            if number > self._answered:
                self._answered = number
                self._journal.note(
                    "agreed", request=answer.kind.name.lower(), number=number, step=answer.step
                )
