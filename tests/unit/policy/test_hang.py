"""When silence is a hang, and whose."""

from __future__ import annotations

import math

import pytest

from elastic_ckpt.policy.hang import FACTOR, LONG_SECONDS, Pace, Paces, culprit


def pace(
    idle: float,
    phase: str = "training",
    *,
    rank: int = 0,
    entered: int = 7,
    has_stepped: bool = True,
) -> Pace:
    return Pace(rank, phase, entered, idle, has_stepped)


@pytest.mark.parametrize(
    ("one", "limit"),
    [
        (pace(0.0), 100.0),  # ten times the longest step
        (pace(0.0, "fetching"), 60.0),  # nothing was learnt of it
        (pace(0.0, has_stepped=False), LONG_SECONDS),  # the first step compiles
        (pace(0.0, "fetching", has_stepped=False), LONG_SECONDS),
        (pace(0.0, "loading"), LONG_SECONDS),
        (pace(0.0, "saving"), LONG_SECONDS),
        (pace(0.0, "evaluating"), LONG_SECONDS),
        (pace(0.0, "between"), LONG_SECONDS),
        (pace(0.0, "launched"), math.inf),
        (pace(0.0, "leaving"), math.inf),
    ],
)
def test_each_phase_has_a_limit_of_its_own(one: Pace, limit: float) -> None:
    paces = Paces(60.0)
    paces.learn(pace(10.0))
    assert paces.limit_seconds(one) == limit


def test_the_limit_grows_with_the_longest_step_and_never_falls_below_the_least() -> None:
    paces = Paces(60.0)
    for seconds, limit in ((0.1, 60.0), (5.9, 60.0), (7.0, 70.0), (1.0, 70.0), (30.0, 300.0)):
        paces.learn(pace(seconds))
        assert paces.limit_seconds(pace(0.0)) == pytest.approx(max(limit, FACTOR * seconds))


def test_what_says_nothing_of_a_step_is_not_learnt_from() -> None:
    paces = Paces(60.0)
    for one in (pace(900.0, has_stepped=False), pace(900.0, "saving"), pace(900.0, "evaluating")):
        paces.learn(one)
    assert paces.longest == {}


def test_all_ranks_must_be_over_their_limits() -> None:
    paces = Paces(60.0)
    silent = pace(61.0)
    assert paces.hangs([silent, silent])
    assert not paces.hangs([silent, pace(59.0)])
    assert not paces.hangs([silent, pace(61.0, "evaluating")])  # the others wait for it
    assert not paces.hangs([silent, pace(61.0, has_stepped=False)])
    assert not paces.hangs([])


@pytest.mark.parametrize(
    ("paces", "waiting", "rank"),
    [
        ([pace(9, rank=0, entered=8), pace(9, rank=1, entered=7)], [0, 1], 1),  # a step behind
        ([pace(9, rank=0), pace(9, "fetching", rank=1)], [], 1),  # no data
        ([pace(9, rank=0), pace(9, rank=1), pace(9, rank=2)], [0, 2], 1),  # does not wait
        ([pace(9, rank=0), pace(9, rank=1)], [0, 1], -1),  # all wait, for somebody else
        ([pace(9, rank=0), pace(9, rank=1)], [], -1),  # nobody does
        ([pace(9, rank=0)], [], -1),  # alone
    ],
)
def test_who_is_to_blame(paces: list[Pace], waiting: list[int], rank: int) -> None:
    assert culprit(paces, waiting) == rank
