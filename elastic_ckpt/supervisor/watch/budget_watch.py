"""Refills the failure budget, and what is shown of it, while the workers make progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from elastic_ckpt.policy.restart import RestartPolicy
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.supervisor.ports import Key
from elastic_ckpt.supervisor.run_record import RunRecord

_LOOK_SECONDS: Final = 1.0


class BudgetWatch:
    """Watches the progress of one run; the supervisor's loop calls :meth:`poll` at each turn while
    workers run."""

    def __init__(
        self, policy: RestartPolicy, board: Board, newest: Callable[[], Key], record: RunRecord
    ) -> None:
        """``newest`` returns the newest checkpoint that is known, without waiting."""
        self._policy = policy
        self._board = board
        self._newest = newest
        self._record = record
        self._next = 0.0

    def poll(self, now: float) -> None:
        """Count progress at monotonic ``now``, and publish the number of failures left."""
        if now < self._next:
            return
        self._next = now + _LOOK_SECONDS
        slots = (slot for slot in self._board.read_slots() if slot.attached)
        steps = max((slot.finished - slot.start_step for slot in slots), default=0)
        self._policy.progressed(self._newest(), steps)
        if self._record.node.failures_left != self._policy.left:
            self._record.update(failures_left=self._policy.left)
