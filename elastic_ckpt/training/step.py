"""A rank's side of the stop-step agreement, on the board; see ``protocol/agreement.py``."""

from __future__ import annotations

import logging
import time
from typing import Final

from elastic_ckpt.errors import StopAborted
from elastic_ckpt.protocol.agreement import ActionKind, Agenda, StepAction
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Phase, SlotWriter

log = logging.getLogger(__name__)

ANSWER_SECONDS: Final = 60.0
"""The watcher answers within milliseconds; after this long it is gone."""

_POLL_SECONDS: Final = 0.0005


class StepProtocol:
    """Shows the board which step this rank enters, and finds the requests that it must serve. No
    call waits for another rank."""

    def __init__(self, board: Board, slot: SlotWriter) -> None:
        self._board = board
        self._slot = slot
        self._agenda = Agenda()
        self._entered = False
        self._stepped = False
        self._attached = False
        self._finished = 0
        self._base = 0
        self._counts_anew = False

    def attach(self, start_step: int, *, declares: bool = True) -> None:
        """Take part, having resumed from ``start_step``.

        The agreement needs steps that only grow within an incarnation. So those of a later session
        are counted on from the last one's; the board shows the session's own besides.

        Args:
            declares: whether the rank shows evaluations on the board as a phase.
        """
        if self._attached:
            self._base, self._counts_anew = self._finished - start_step, True
            self._slot.own_step(start_step)
            return
        self._attached, self._finished = True, start_step
        self._slot.attach(start_step, declares=declares)
        self._slot.step(start_step, start_step, 0, 0)

    @property
    def has_stepped(self) -> bool:
        """Whether this incarnation has finished a step, in whichever session."""
        return self._stepped

    @property
    def requested(self) -> bool:
        """Whether there is a request that this rank has not served; does not wait."""
        return self._board.flag != self._agenda.seen or bool(self._agenda.open)

    def enter(
        self, finished: int, epoch: int = 0, samples: int = 0, *, comes_back: bool = True
    ) -> StepAction:
        """Call with the batch in hand, before step ``finished + 1`` begins.

        Args:
            finished: optimizer steps that this rank has finished, as its session counts them.
            epoch, samples: the position, for ``status``.
            comes_back: whether the rank calls again after a save, before the step begins. If not,
                the step counts as started although the rank still has to save.

        Returns:
            GO; or SAVE or STOP, if all ranks do that at the end of step ``finished``.

        Raises:
            StopAborted: a rank died during the agreement, or the supervisor is gone.
        """
        if self._counts_anew:
            self._slot.own_step(finished)
            finished += self._base
        self._slot.step(finished + 1, finished, epoch, samples)
        agenda = self._agenda
        if self._board.flag == agenda.seen and not agenda.open:
            if not self._entered:
                self._begin()
            return _GO
        action = self._consult(finished)
        stays = comes_back or action.kind is ActionKind.STOP
        if action.kind is ActionKind.GO or not stays:
            self._begin()
        else:
            # The batch is put back: this rank has started nothing beyond what it finished.
            self._slot.step(finished, finished, epoch, samples)
        self._slot.seen(agenda.seen)
        return action

    def stepped(self) -> None:
        """Note a finished step; the first one of an incarnation ends a recovery."""
        self._finished += 1
        if not self._stepped:
            self._stepped = True
            self._slot.stepped()
            log.info("the first step is finished")

    def _begin(self) -> None:
        if not self._entered:
            self._entered = True
            self._slot.first_entry()
            self._slot.phase(Phase.TRAINING)

    def _consult(self, finished: int) -> StepAction:
        limit = time.monotonic() + ANSWER_SECONDS
        while True:
            action = self._agenda.decide(finished, self._board.flag, self._board.answers())
            if action.kind is not ActionKind.WAIT:
                log.info("request at step %d: %s", finished, action.kind.name)
                return action
            if self._board.aborted > self._agenda.seen or time.monotonic() > limit:
                raise StopAborted(
                    "the agreement on a stop step was aborted: a rank or the supervisor died"
                )
            time.sleep(_POLL_SECONDS)


_GO: Final = StepAction(ActionKind.GO)
