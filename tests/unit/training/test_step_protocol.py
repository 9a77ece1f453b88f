"""The steps that the agreement sees only grow, through all sessions of a process."""

from __future__ import annotations

from elastic_ckpt.protocol.agreement import ActionKind, RequestAnswer, RequestKind, answer_step
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.training.step import StepProtocol


def test_later_session_counts_on_from_the_last_one() -> None:
    """The first resumes at 40 and makes two steps, the second at 5: the agreement sees 43 next."""
    board = Board.private()
    steps = StepProtocol(board, board.rank_slot(0))
    steps.attach(40)
    for finished in (40, 41):
        assert steps.enter(finished).kind is ActionKind.GO
        steps.stepped()
    steps.attach(5)
    assert steps.enter(5, epoch=1, samples=20).kind is ActionKind.GO
    slot = board.read_slot(0)
    assert (slot.entered, slot.finished, slot.shown_step, slot.start_step) == (43, 42, 5, 40)
    steps.stepped()
    board.raise_flag(1)
    board.post_answer(RequestAnswer(1, RequestKind.STOP, answer_step(board.entered())))
    assert steps.enter(6).kind is ActionKind.STOP


def test_stop_agreed_between_two_sessions_is_served_where_the_second_begins() -> None:
    board = Board.private()
    steps = StepProtocol(board, board.rank_slot(0))
    steps.attach(0)
    steps.enter(0)
    steps.stepped()
    board.raise_flag(1)
    board.post_answer(RequestAnswer(1, RequestKind.STOP, answer_step(board.entered())))
    steps.attach(0)
    assert steps.enter(0).kind is ActionKind.STOP
