"""Warns of a script that creates no Session, and of a Session that is open and shows no step."""

from __future__ import annotations

from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.ended import Ended, EndKind
from elastic_ckpt.protocol.stepless import (
    CREATE_ONE,
    NO_SESSION,
    STEPLESS,
    STEPLESS_SECONDS,
    is_sessionless,
    stepless_since,
)
from elastic_ckpt.supervisor.ports import Clock
from elastic_ckpt.supervisor.run_record import RunRecord
from elastic_ckpt.util.journald import warning


class SteplessWatch:
    """Watches one node's ranks; the supervisor's loop calls :meth:`poll` at each turn."""

    def __init__(self, clock: Clock, board: Board, record: RunRecord) -> None:
        self._clock = clock
        self._board = board
        self._record = record
        self._next = 0.0

    def begin(self) -> None:
        """Start watching another incarnation."""
        self._set(0.0)

    def poll(self, now: float) -> None:
        """Warn once when no Session was created for a minute, or was open without a step.

        Args:
            now: monotonic seconds.
        """
        if now < self._next:
            return
        self._next = now + 1.0
        self._look_for_session(now)
        since = stepless_since(self._board.read_slots()) / 1e9
        if not since:
            self._set(0.0)
        elif now - since > STEPLESS_SECONDS and not self._record.node.stepless_since:
            self._set(self._clock.wall() - (now - since))
            self._record.say(
                warning(f"no step for {now - since:.0f} s in the open Session, {STEPLESS}")
            )

    def ended(self, ended: Ended) -> None:
        """Report a script that was completed without a step, unless it resumed at its end."""
        if ended.kind is EndKind.COMPLETED and ended.attached and not ended.finished:
            self._set(self._record.node.stepless_since or self._clock.wall())
            self._record.say(warning(f"the script's Session closed without one step, {STEPLESS}"))

    def _look_for_session(self, now: float) -> None:
        node, slots = self._record.node, self._board.read_slots()
        if node.sessionless and any(slot.attached for slot in slots):
            self._record.update(sessionless=False)  # it only took long
            return
        if node.sessionless or node.saves_itself or not is_sessionless(slots, int(now * 1e9)):
            return
        self._record.update(sessionless=True)
        self._record.say(warning(f"{NO_SESSION}: {CREATE_ONE}"))

    def _set(self, since: float) -> None:
        if self._record.node.stepless_since != since:
            self._record.update(stepless_since=since)
