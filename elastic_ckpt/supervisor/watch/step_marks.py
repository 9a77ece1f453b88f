"""Journals where the training is, and which step its ranks agreed on."""

from __future__ import annotations

from typing import Final

from elastic_ckpt.journal.events import StepAgreed, StepMark
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Slot
from elastic_ckpt.supervisor.ports import Clock

MAX_GAP_SECONDS: Final = 30.0
MIN_GAP_SECONDS: Final = 1.0
_SHARE: Final = 1 / 20
"""Marks are a twentieth of an incarnation's age apart, within these two limits: a short run has
some, and a long one at most 2,880 a day."""


class StepMarks:
    """The step marks of one node; the supervisor's loop calls :meth:`poll` at each turn."""

    def __init__(self, clock: Clock, board: Board, journal: Journal) -> None:
        self._clock = clock
        self._board = board
        self._journal = journal
        self.begin()

    def begin(self) -> None:
        """Forget the last incarnation: another one is about to be launched."""
        self._began = self._next = 0.0
        self._step = -1
        self._answered = 0

    def poll(self, now: float) -> None:
        """Journal what is due; ``now`` is monotonic seconds."""
        self._note_answers()
        if now < self._next:
            return
        slot = self._slowest()
        if slot is None:
            return
        self._began = self._began or slot.first_entry / 1e9
        self._mark(slot)
        age = now - self._began
        self._next = now + min(MAX_GAP_SECONDS, max(MIN_GAP_SECONDS, _SHARE * age))

    def last(self) -> None:
        """Journal where the incarnation was when it ended."""
        self._note_answers()
        slot = self._slowest()
        if slot is not None:
            self._mark(slot)

    def _slowest(self) -> Slot | None:
        """Return the rank that has finished the fewest steps, of those that train."""
        started = [slot for slot in self._board.read_slots() if slot.first_entry and slot.attached]
        return min(started, key=lambda slot: slot.finished, default=None)

    def _mark(self, slot: Slot) -> None:
        if slot.finished <= self._step:
            return
        self._step = slot.finished
        # What rank 0 reports counts, and it is the first of the node that leads.
        self._journal.note(
            StepMark(
                step=slot.shown_step,
                epoch=slot.epoch,
                sample_start_index=slot.sample_start_index,
                samples_per_step=slot.samples_per_step,
                total_steps=slot.total_steps,
                age_seconds=self._clock.monotonic() - slot.beat / 1e9,
                metrics=self._board.read_slot(0).metrics,
            )
        )

    def _note_answers(self) -> None:
        """Journal the agreement's results: a few numbers in shared memory."""
        for number, answer in sorted(self._board.answers().items()):
            if number > self._answered:
                self._answered = number
                self._journal.note(
                    StepAgreed(request=answer.kind.name.lower(), number=number, step=answer.step)
                )
