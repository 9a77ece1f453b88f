"""What several nodes' verdicts on one incarnation come to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.ended import (
    EARLY_SECONDS,
    Ended,
    EndKind,
    end_kind,
    ended_early,
    left_unsaved,
    merge,
    outcome_of_zero,
)
from elastic_ckpt.protocol.slot import Outcome, SessionStage, Slot
from elastic_ckpt.protocol.start_marks import Marks


def ended(kind: str, **about) -> Ended:
    return Ended(incarnation=3, kind=EndKind(kind), **about)


@pytest.mark.parametrize(
    ("kinds", "merged"),
    [
        (["completed", "completed"], "completed"),
        (["stopped", "stopped"], "stopped"),
        (["completed", "stopped"], "stopped"),
        (["not-begun", "not-begun"], "not-begun"),
        (["not-begun", "stopped"], "not-begun"),
        (["cut-short", "crashed"], "crashed"),
        (["stopped", "crashed"], "crashed"),
        (["cut-short", "cut-short"], "crashed"),
    ],
)
def test_the_worst_of_all_nodes_counts(kinds: list[str], merged: str) -> None:
    assert merge([ended(kind) for kind in kinds]).kind.value == merged


def test_a_killed_worker_is_the_cause_before_one_that_raised() -> None:
    raised = ended("crashed", rank=0, exit_code=1, message="connection reset", failed_wall=9.0)
    killed = ended("crashed", rank=5, exit_code=-9, message="killed by SIGKILL", failed_wall=9.5)
    found = merge([raised, ended("cut-short"), killed])
    assert (found.rank, found.exit_code, found.message) == (5, -9, "killed by SIGKILL")


def test_the_first_worker_that_raised_is_the_cause() -> None:
    late = ended("crashed", rank=0, exit_code=1, message="connection reset", failed_wall=9.2)
    first = ended("crashed", rank=3, exit_code=1, message="ValueError: no", failed_wall=9.1)
    assert merge([late, first]).message == "ValueError: no"


def test_a_lost_node_is_the_cause_before_any_rank() -> None:
    raised = ended("crashed", rank=0, exit_code=1, message="connection reset", failed_wall=9.0)
    found = merge([raised], ("n2",))
    assert (found.kind, found.rank, found.exit_code) == (EndKind.CRASHED, -1, 0)
    assert (found.message, found.lost) == ("lost node n2", ("n2",))


def test_a_node_that_left_early_counts_as_lost() -> None:
    found = merge([ended("cut-short"), ended("cut-short", lost=("n2",))])
    assert (found.message, found.lost) == ("lost node n2", ("n2",))


def test_progress_is_of_any_node_and_times_are_the_heads() -> None:
    own = ended("stopped", stepped=False, steps=3, finished=10, failed_at=7)
    other = ended("stopped", stepped=True, steps=4, finished=11, attached=True, failed_at=99)
    found = merge([own, other])
    assert (found.stepped, found.attached, found.steps, found.finished) == (True, True, 4, 11)
    assert found.failed_at == 7


def test_cut_short_does_not_count_as_stopped() -> None:
    failed = {kind.value: ended(kind.value).failed for kind in EndKind}
    assert [name for name, bad in failed.items() if bad] == ["crashed", "cut-short"]


def test_only_a_rank_is_named() -> None:
    assert ended("crashed", rank=3, message="killed").what == "rank 3 failed: killed"
    assert ended("crashed", message="lost node n2").what == "lost node n2"
    assert ended("stopped").what == ""


NONE, COMPLETED, STOPPED, UNSAVED, FAILED = Outcome


@pytest.mark.parametrize(
    ("outcomes", "plain", "cut_short", "not_begun"),
    [
        ({COMPLETED}, EndKind.COMPLETED, EndKind.COMPLETED, EndKind.COMPLETED),
        ({STOPPED, COMPLETED}, EndKind.STOPPED, EndKind.STOPPED, EndKind.STOPPED),
        (
            {UNSAVED, COMPLETED},
            EndKind.NOT_BEGUN,
            EndKind.CUT_SHORT,
            EndKind.NOT_BEGUN,
        ),
        (
            {UNSAVED, STOPPED},
            EndKind.CRASHED,
            EndKind.CUT_SHORT,
            EndKind.NOT_BEGUN,
        ),
        ({NONE, COMPLETED}, EndKind.CRASHED, EndKind.CUT_SHORT, EndKind.NOT_BEGUN),
        ({FAILED, STOPPED}, EndKind.CRASHED, EndKind.CUT_SHORT, EndKind.NOT_BEGUN),
    ],
)
def test_the_kind_follows_from_all_outcomes(
    outcomes: set[Outcome], plain: EndKind, cut_short: EndKind, not_begun: EndKind
) -> None:
    assert end_kind(outcomes, cut_short=False, not_begun=False) is plain
    assert end_kind(outcomes, cut_short=True, not_begun=True) is cut_short
    assert end_kind(outcomes, cut_short=False, not_begun=True) is not_begun


def slot(rank: int = 0, **changes: Any) -> Slot:
    return replace(Board.private().read_slot(0), rank=rank, **changes)


OPEN, LEFT, SEALED = SessionStage.OPEN, SessionStage.LEFT, SessionStage.SEALED


@pytest.mark.parametrize(
    ("session", "attached", "running", "stopping"),
    [
        (SessionStage.NONE, False, COMPLETED, UNSAVED),
        (SessionStage.NONE, True, COMPLETED, COMPLETED),  # a loop with should_save
        (OPEN, True, NONE, NONE),
        (LEFT, True, COMPLETED, COMPLETED),
        (SEALED, True, COMPLETED, COMPLETED),
    ],
)
def test_code_0_without_an_outcome_counts_by_what_is_saved(
    session: SessionStage, attached: bool, running: Outcome, stopping: Outcome
) -> None:
    gone = slot(session_stage=session, start_step=0) if attached else slot(session_stage=session)
    assert outcome_of_zero(gone, stop_wanted=False) is running
    assert outcome_of_zero(gone, stop_wanted=True) is stopping


LATE = int((EARLY_SECONDS + 1) * 1e9)


@pytest.mark.parametrize(
    ("gone", "other", "early"),
    [
        (SessionStage.NONE, {"session_stage": OPEN}, True),
        (LEFT, {"session_stage": OPEN}, True),
        (SEALED, {"session_stage": OPEN}, False),
        (SessionStage.NONE, {"marks": Marks(group_began=1)}, True),
        (SessionStage.NONE, {"marks": Marks(group_began=1, group_ended=2)}, False),
        (SessionStage.NONE, {"session_stage": OPEN, "outcome": COMPLETED}, False),
        (SessionStage.NONE, {}, False),
    ],
)
def test_rank_that_ends_while_others_wait_for_it_has_failed(
    gone: SessionStage, other: dict[str, Any], early: bool
) -> None:
    slots = [slot(0, outcome=COMPLETED, session_stage=gone, left=1), slot(1, **other)]
    assert ended_early(slots, LATE) == (slots[0] if early else None)
    assert ended_early(slots, LATE - int(2e9)) is None  # the other may be about to end, too


def test_what_an_exception_left_unsaved_is_said() -> None:
    left = slot(1, session_stage=LEFT, finished=7, saved_step=5)
    said = "rank 1 left its Session by an exception after step 7, unsaved: its newest checkpoint "
    assert left_unsaved([slot(session_stage=SEALED), left]) == said + "is of step 5"
    assert left_unsaved([replace(left, saved_step=-1)]) == said + "is missing"
    assert left_unsaved([replace(left, finished=5)]) == ""
    assert left_unsaved([replace(left, finished=0, saved_step=-1)]) == ""


def test_work_is_sealed_if_it_is_on_every_node() -> None:
    assert merge([ended("completed", sealed=True), ended("completed", sealed=True)]).sealed
    assert not merge([ended("completed", sealed=True), ended("completed")]).sealed


def test_worker_that_lost_its_peer_is_not_the_cause_whatever_the_clocks_say() -> None:
    lost_peer = "RuntimeError: Connection closed by peer [10.0.0.2]:4711"
    other = ended("crashed", rank=0, exit_code=1, failed_wall=1.0, message=lost_peer, node="n1")
    cause = ended("crashed", rank=1, exit_code=1, failed_wall=2.0, message="no route", node="n2")
    assert (merge([other, cause]).rank, merge([other, cause]).node) == (1, "n2")
    assert merge([other, replace_ended(cause, message=lost_peer)]).node == "n1"


def replace_ended(one: Ended, **about) -> Ended:
    return msgspec.structs.replace(one, **about)
