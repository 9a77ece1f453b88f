"""How an incarnation ended, from what its workers left on the board."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.ended import EndKind
from elastic_ckpt.protocol.slot import Outcome, SessionStage, Slot
from elastic_ckpt.protocol.start_marks import Marks
from elastic_ckpt.supervisor.agent.launch import run_id
from elastic_ckpt.supervisor.agent.verdict import (
    ended_before,
    exit_text,
    explain,
    in_background,
    launch_failed,
    lived_seconds,
    summarize,
)


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
        (0, None, (0, "it exited with code 0 inside an open Session, after step 0")),
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


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (OSError(36, "File name too long"), 70),
        (RuntimeError("no\nmore"), 70),
        (ConnectionRefusedError("refused"), 0),  # the template was killed: a retry starts another
        (EOFError(), 0),
    ],
)
def test_a_launch_that_failed_is_explained_by_its_exception(
    error: Exception, exit_code: int
) -> None:
    code, message = launch_failed(error)
    assert code == exit_code
    assert message.startswith(f"the workers could not be launched: {type(error).__name__}")
    assert "\n" not in message


def test_rank_that_left_before_the_others_is_explained() -> None:
    code, message = explain(slot(outcome=Outcome.COMPLETED), -9, record(-9))
    assert code == 0
    assert message.startswith("it exited with code 0 and closed no Session")


def test_a_daemon_is_a_wrong_use() -> None:
    found = in_background(summarize(1, EndKind.COMPLETED, [slot()]), 77)
    assert (found.kind, found.exit_code, found.rank) == (EndKind.CRASHED, 64, -1)
    assert "process 77" in found.message
    # It may have trained for hours and have left only an upload behind.
    assert "if that trains" in found.message and "wait for it" in found.message


def test_work_is_sealed_if_every_session_is() -> None:
    sealed, open_ = slot(session_stage=SessionStage.SEALED), slot(session_stage=SessionStage.OPEN)
    assert summarize(1, EndKind.COMPLETED, [sealed, sealed]).sealed
    assert not summarize(1, EndKind.CRASHED, [sealed, open_]).sealed


def test_a_worker_lived_from_its_first_line() -> None:
    assert lived_seconds(slot(marks=Marks(entered=2_000_000_000)), 5_000_000_000) == 3.0
    assert lived_seconds(slot(), 5) == 0.0


def test_torch_elastics_name_of_an_incarnation_fits_into_a_file_name() -> None:
    assert run_id("told", 3) == "told.3"
    assert run_id("a/b \N{SNOWMAN}" + "n" * 300, 12) == "a_b__" + "n" * 35 + ".12"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"outcome": Outcome.COMPLETED, "left": 4}, "; rank 0 had ended with code 0 before"),
        ({"outcome": Outcome.COMPLETED, "left": 6}, ""),
        ({"outcome": Outcome.FAILED, "left": 4}, ""),
        ({"outcome": Outcome.COMPLETED, "left": 4, "session_stage": SessionStage.SEALED}, ""),
    ],
)
def test_rank_that_had_left_is_named_beside_the_one_that_missed_it(
    other: dict[str, Any], words: str
) -> None:
    failed = slot(rank=1, outcome=Outcome.FAILED, left=5)
    assert ended_before(failed, [slot(rank=0, **other), failed]) == words
