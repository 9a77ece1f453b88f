"""The interval of ``--save-interval auto``."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ckpt.policy.interval import (
    HYSTERESIS,
    MAX_INTERVAL_SECONDS,
    MAX_SAVE_SHARE,
    MIN_INTERVAL_SECONDS,
    daly_interval,
    estimate_mtbf,
    optimal_interval,
)

HOUR = 3600.0


def expected_runtime(interval: float, save: float, mtbf: float) -> float:
    """Return the wall time per second of work by Daly's complete model, without restart cost."""
    return mtbf * math.expm1(interval / mtbf) / (interval - save)


@pytest.mark.parametrize("mtbf", [60.0, HOUR, 30 * HOUR])
@pytest.mark.parametrize("share", [1e-6, 1e-4, 0.01, 0.1, 0.5, 1.0, 1.9])
def test_the_interval_is_optimal_under_the_complete_model(mtbf: float, share: float) -> None:
    """No interval within a factor of 30 is better by more than half a percent."""
    save = share * mtbf
    chosen = daly_interval(save, mtbf)
    tried = [save + (chosen - save) * 30 ** (number / 200) for number in range(-200, 201)]
    best = min(expected_runtime(interval, save, mtbf) for interval in tried)
    assert expected_runtime(chosen, save, mtbf) <= best * 1.005


def test_the_limit_for_short_saves_is_young_s_formula() -> None:
    assert daly_interval(1e-6, HOUR) == pytest.approx(math.sqrt(2e-6 * HOUR), rel=1e-4)


def test_the_prior_fades_as_failures_are_observed() -> None:
    """The prior is one failure in 10 h; one per hour is observed."""
    seen = [estimate_mtbf(10 * HOUR, count * HOUR, count) / HOUR for count in (0, 1, 9, 999)]
    assert seen == pytest.approx([10.0, 5.5, 1.9, 1.009])


def test_time_without_a_failure_raises_the_estimate() -> None:
    assert estimate_mtbf(HOUR, 3 * HOUR, 0) == 4 * HOUR


@pytest.mark.parametrize(
    ("save", "mtbf", "seconds", "why"),
    [
        (0.2, 6 * HOUR, 93.1, "every 93 s: a save costs 0.2 s and the job fails every 6 h"),
        (2.0, 6 * HOUR, 294.6, "every 4.9 min: a save costs 2 s and the job fails every 6 h"),
        (
            10.0, 600.0, 200.0,
            "every 3.3 min, to spend at most 5% of the time in saves: a save costs 10 s and "
            "the job fails every 10 min",
        ),
        (
            300.0, 6 * HOUR, 6000.0,
            "every 1.7 h, to spend at most 5% of the time in saves: a save costs 5 min and "
            "the job fails every 6 h",
        ),
        (
            30.0, 1000 * HOUR, MAX_INTERVAL_SECONDS,
            "every 60 min, the longest interval: a save costs 30 s and the job fails every 42 d",
        ),
        (
            0.0, HOUR, MIN_INTERVAL_SECONDS,
            "every 1 s: a save costs under 1 ms and the job fails every 60 min",
        ),
    ],
)  # fmt: skip
def test_the_interval_and_its_reason(save: float, mtbf: float, seconds: float, why: str) -> None:
    found = optimal_interval(save, mtbf)
    assert found.seconds == pytest.approx(seconds, abs=0.1)
    assert found.why == why


def test_a_change_of_a_tenth_keeps_the_interval_but_updates_the_reason() -> None:
    first = optimal_interval(2.0, 6 * HOUR)
    same = optimal_interval(2.0, 6 * HOUR * 1.19, first.seconds)  # the root of it is below 1.1
    assert same.seconds == first.seconds
    assert same.why.endswith("every 7.1 h")
    other = optimal_interval(2.0, 6 * HOUR * 1.23, first.seconds)
    assert other.seconds == pytest.approx(first.seconds * math.sqrt(1.23), rel=0.01)


saves = st.floats(0.0, 1e5)
times = st.floats(1.0, 1e8)


@settings(max_examples=300, derandomize=True, database=None)
@given(saves, times, st.none() | st.floats(0.1, 1e6))
def test_saves_never_take_more_than_their_share(
    save: float, mtbf: float, current: float | None
) -> None:
    """The interval does not exceed its maximum if the share permits."""
    seconds = optimal_interval(save, mtbf, current).seconds
    assert save <= MAX_SAVE_SHARE * seconds * (1 + 1e-9)
    assert seconds >= MIN_INTERVAL_SECONDS
    most = max(MAX_INTERVAL_SECONDS, save / MAX_SAVE_SHARE)
    assert seconds <= most * (1 + HYSTERESIS) / (1 - HYSTERESIS)


@settings(max_examples=300, derandomize=True, database=None)
@given(saves, times, st.floats(0.8, 1.2))
def test_the_interval_is_stable_under_noise(save: float, mtbf: float, noise: float) -> None:
    """Saves whose cost repeatedly varies by a fifth move the interval at most once."""
    first = optimal_interval(save, mtbf).seconds
    second = optimal_interval(save * noise, mtbf, first).seconds
    third = optimal_interval(save * noise, mtbf, second).seconds
    assert third == second
