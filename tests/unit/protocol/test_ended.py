"""What several nodes' verdicts on one incarnation come to."""

from __future__ import annotations

import pytest

from elastic_ckpt.protocol.ended import Ended, EndKind, end_kind, merge
from elastic_ckpt.protocol.slot import Outcome


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
