"""When silence is a hang, and which rank is to blame."""

from __future__ import annotations

import math

import pytest

from elastic_ckpt.policy.hang import (
    HANG_FACTOR,
    MIN_HANG_SECONDS,
    PACE_SILENCES,
    RARE_PHASE_SECONDS,
    Effort,
    HangDetector,
    Silence,
    culprit,
)


def silence(
    idle: float,
    phase: str = "training",
    *,
    rank: int = 0,
    entered: int = 7,
    has_stepped: bool = True,
) -> Silence:
    return Silence(rank, phase, entered, idle, has_stepped)


def paced(seconds: float, phase: str = "training") -> HangDetector:
    """Return the default detector, after enough silences of these seconds to know the pace."""
    detector = HangDetector()
    for _ in range(PACE_SILENCES):
        detector.learn(silence(seconds, phase))
    return detector


@pytest.mark.parametrize(
    ("one", "limit"),
    [
        (silence(0.0), 100.0),  # ten times the longest step
        (silence(0.0, "fetching"), 300.0),  # nothing learned for this phase
        (silence(0.0, has_stepped=False), RARE_PHASE_SECONDS),  # the first step compiles
        (silence(0.0, "fetching", has_stepped=False), RARE_PHASE_SECONDS),
        (silence(0.0, "loading"), RARE_PHASE_SECONDS),
        (silence(0.0, "saving"), RARE_PHASE_SECONDS),
        (silence(0.0, "evaluating"), RARE_PHASE_SECONDS),
        (silence(0.0, "between"), RARE_PHASE_SECONDS),
        (silence(0.0, "launched"), math.inf),
        (silence(0.0, "leaving"), math.inf),
    ],
)
def test_each_phase_has_its_own_limit(one: Silence, limit: float) -> None:
    detector = paced(10.0)
    assert detector.limit_seconds(one) == limit


def test_the_limit_grows_with_the_longest_step_and_has_a_minimum() -> None:
    detector = paced(0.05)
    for seconds, limit in ((0.1, 60.0), (5.9, 60.0), (7.0, 70.0), (1.0, 70.0), (30.0, 300.0)):
        detector.learn(silence(seconds))
        assert detector.limit_seconds(silence(0.0)) == pytest.approx(
            max(limit, HANG_FACTOR * seconds)
        )


def test_first_steps_and_rare_phases_are_not_learned_from() -> None:
    detector = HangDetector(60.0)
    for one in (
        silence(900.0, has_stepped=False),
        silence(900.0, "saving"),
        silence(900.0, "evaluating"),
    ):
        detector.learn(one)
    assert detector.longest == {}


def test_a_job_hangs_only_if_every_rank_exceeds_its_limit() -> None:
    detector = paced(0.05)
    silent = silence(61.0)
    assert detector.hangs([silent, silent])
    assert not detector.hangs([silent, silence(59.0)])
    assert not detector.hangs([silent, silence(61.0, "evaluating")])  # the others wait for it
    assert not detector.hangs([silent, silence(61.0, has_stepped=False)])
    assert not detector.hangs([])


def test_a_short_step_is_given_a_minute_once_the_pace_is_known() -> None:
    detector = HangDetector()
    for _ in range(PACE_SILENCES - 1):
        detector.learn(silence(0.05))
    assert not detector.hangs([silence(299.0)]) and detector.hangs([silence(301.0)])
    detector.learn(silence(0.05))
    assert not detector.hangs([silence(MIN_HANG_SECONDS)])
    assert detector.hangs([silence(MIN_HANG_SECONDS + 1)])


@pytest.mark.parametrize(
    ("effort", "limit"), [(Effort.IDLE, 60.0), (Effort.SPINNING, 300.0), (Effort.WORKING, 1800.0)]
)
def test_workers_that_are_seen_at_work_have_longer(effort: Effort, limit: float) -> None:
    """A step may compile again, or hold an evaluation that was not declared."""
    detector = paced(0.05)
    assert detector.limit_seconds(silence(0.0), effort) == limit
    rare = detector.limit_seconds(silence(0.0, "between"), effort)  # a loop that forgot batches()
    assert rare == effort.value * RARE_PHASE_SECONDS


def test_data_that_come_slowly_are_given_five_minutes_also_at_a_known_pace() -> None:
    assert paced(0.001, "fetching").limit_seconds(silence(0.0, "fetching")) == 300.0
    assert paced(100.0, "fetching").limit_seconds(silence(0.0, "fetching")) == 1000.0


@pytest.mark.parametrize(
    ("silences", "waiting", "rank"),
    [
        # Rank 1 is a step behind.
        ([silence(9, rank=0, entered=8), silence(9, rank=1, entered=7)], [0, 1], 1),
        ([silence(9, rank=0), silence(9, "fetching", rank=1)], [], 1),  # no data
        ([silence(9, rank=0), silence(9, rank=1), silence(9, rank=2)], [0, 2], 1),  # does not wait
        ([silence(9, rank=0), silence(9, rank=1)], [0, 1], -1),  # all wait
        ([silence(9, rank=0), silence(9, rank=1)], [], -1),  # none waits
        ([silence(9, rank=0)], [], -1),  # a single rank
    ],
)
def test_the_culprit(silences: list[Silence], waiting: list[int], rank: int) -> None:
    assert culprit(silences, waiting) == rank
