"""Reports ranks that wait long for the process group, which is silent until its own timeout."""

from __future__ import annotations

from typing import Final

from elastic_ckpt.protocol.board import Board
from elastic_ckpt.supervisor.run_record import RunRecord
from elastic_ckpt.util.journald import warning

GROUP_SECONDS: Final = 60.0
"""A start of the process group that takes longer is reported. Where packets are dropped silently,
gloo fails after 9 min."""


class GroupWatch:
    """Watches the ranks of one of several nodes; the supervisor's loop calls :meth:`poll` at each
    turn."""

    def __init__(self, board: Board, record: RunRecord) -> None:
        self._board = board
        self._record = record
        self._next = 0.0
        self._is_reported = False

    def begin(self) -> None:
        """Start watching another incarnation."""
        self._is_reported = False

    def poll(self, now: float) -> None:
        """Report once for how long which ranks have waited; ``now`` in monotonic seconds."""
        if self._is_reported or now < self._next:
            return
        self._next = now + 1.0
        waiting = {
            slot.rank: now - slot.marks.group_began / 1e9
            for slot in self._board.read_slots()
            if slot.marks.group_began and not slot.marks.group_ended
        }
        longest = max(waiting.values(), default=0.0)
        if longest <= GROUP_SECONDS:
            return
        self._is_reported = True
        ranks = ", ".join(map(str, sorted(waiting)))
        message = (
            f"rank {ranks} of this node: {longest:.0f} s in the start of the process group; a "
            "rank starts slowly, or two nodes do not reach each other: open all ports between them"
        )
        self._record.say(warning(message))
        self._record.update(message=message)
