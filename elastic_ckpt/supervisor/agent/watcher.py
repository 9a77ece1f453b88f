"""The watcher of the stop-step agreement on one node's board; see ``protocol/agreement.py``."""

from __future__ import annotations

import time
from typing import Final

from elastic_ckpt.protocol.agreement import RequestAnswer, RequestKind, answer_step
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.cluster import NodeAnswer

FENCE_SECONDS: Final = 0.001
"""Python has no store-load fence; within this time every rank's store reaches this process."""


class Watcher:
    """Answers requests for a node's ranks."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def flag(self, number: int) -> NodeAnswer:
        """Raise a request's flag and return this node's answer."""
        board = self._board
        board.raise_flag(number)
        time.sleep(FENCE_SECONDS)
        step = answer_step(board.entered())
        return NodeAnswer(step, any(slot.first_entry for slot in board.read_slots()))

    def ask(self, kind: RequestKind) -> tuple[RequestAnswer, bool] | None:
        """Flag, answer and post a request, for the only node of a job; return whether no rank has
        begun a step, too. None for a save before the ranks have seen the previous request, which
        then serves for this one."""
        board = self._board
        waiting = any(slot.seen < board.flag for slot in board.read_slots())
        if kind is not RequestKind.STOP and waiting:
            return None
        number = board.flag + 1
        found = self.flag(number)
        answer = RequestAnswer(number, kind, found.step)
        board.post_answer(answer)
        return answer, kind is RequestKind.STOP and not found.started
