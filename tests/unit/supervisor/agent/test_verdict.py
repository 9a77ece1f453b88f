"""How an incarnation ended, from what its workers left on the board."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.ended import EndKind
from elastic_ckpt.protocol.slot import Outcome, Slot
from elastic_ckpt.supervisor.agent.verdict import exit_text, explain, summarize


def slot(**changes: Any) -> Slot:
    return replace(Board.private().read_slot(0), **changes)


def test_an_end_sums_up_the_ranks_that_take_part() -> None:
    board = [
        slot(start_step=10, finished=14, first_entry=1),
        slot(start_step=10, finished=15, first_entry=2),
        slot(finished=99),  # never attached
    ]
    ended = summarize(3, EndKind.CRASHED, board)
    assert (ended.incarnation, ended.kind) == (3, EndKind.CRASHED)
    assert (ended.stepped, ended.attached, ended.steps, ended.finished) == (True, True, 5, 15)
    own = summarize(
        3, EndKind.CRASHED, [slot(start_step=0, finished=7, own_step=13, first_entry=1)]
    )
    assert (own.steps, own.finished) == (7, 13)  # should_save: the script counts over the whole job
    idle = summarize(1, EndKind.NOT_BEGUN, [slot()])
    assert (idle.stepped, idle.attached, idle.steps, idle.finished) == (False, False, 0, 0)


def record(exit_code: int, message: object = None) -> SimpleNamespace:
    """What torch elastic keeps of a failed worker."""
    data = {} if message is None else {"message": {"message": message}}
    return SimpleNamespace(exitcode=exit_code, error_file_data=data)


@pytest.mark.parametrize(
    ("status", "failure", "expected"),
    [
        (-11, None, (-11, "killed by SIGSEGV")),
        (-64, record(1), (-64, "killed by SIGRTMAX")),
        (-77, None, (-77, "killed by signal 77")),
        (3, None, (3, "exit code 3")),
        (3, record(3, "ImportError: x\nmore"), (3, "ImportError: x")),
        (0, None, (0, "it exited with code 0 before the end of the script")),
        (None, record(-6), (-6, "killed by SIGABRT")),
        (None, None, (-9, "killed by SIGKILL")),
        (255, None, (-9, "killed by SIGKILL")),
    ],
)
def test_a_worker_without_an_outcome_is_explained_by_its_exit_status(
    status: int | None, failure: object, expected: tuple[int, str]
) -> None:
    assert explain(slot(rank=1, pid=7), status, failure) == expected


def test_a_posted_failure_explains_itself() -> None:
    failed = slot(outcome=Outcome.FAILED, exit_code=1, reason="ValueError: x")
    assert explain(failed, -9, record(-9)) == (1, "ValueError: x")
    assert explain(slot(outcome=Outcome.FAILED, exit_code=4), None, None) == (4, "exit code 4")


def test_an_exit_status_in_words() -> None:
    assert exit_text(None) == "exit status unknown"
    assert exit_text(0) == "exit code 0"
    assert exit_text(-15) == "killed by SIGTERM"
