"""A copy pauses while training is slower beside it, and always makes some progress."""

from __future__ import annotations

import math

import pytest

from elastic_ckpt.policy.pace import MAX_EASE, Pace, Throttle, drops_for_newer


def fed(pace: Pace, start: float, seconds: float, per_second: float, *, copying: bool) -> float:
    """Feed a pace four times a second; return the time after it."""
    for tick in range(int(seconds * 4) + 1):
        now = start + tick / 4
        pace.feed(now, int(now * per_second), copying=copying)
    return start + seconds


def test_it_is_slowed_only_by_what_a_copy_takes() -> None:
    pace = Pace()
    now = fed(pace, 0.0, 10.0, 100.0, copying=False)
    assert not pace.is_slowed
    now = fed(pace, now, 5.0, 100.0, copying=True)
    assert not pace.is_slowed


def test_it_is_slowed_while_a_copy_takes_a_fifth() -> None:
    pace = Pace()
    now = fed(pace, 0.0, 10.0, 100.0, copying=False)
    done = int(now * 100)
    for tick in range(1, 21):
        pace.feed(now + tick / 4, done + tick * 20, copying=True)
    assert pace.is_slowed
    for tick in range(21, 41):
        pace.feed(now + tick / 4, done + tick * 25, copying=False)
    assert not pace.is_slowed


def test_a_job_that_has_not_begun_is_not_slowed() -> None:
    pace = Pace()
    for tick in range(100):
        pace.feed(tick / 4, 0, copying=True)
    assert not pace.is_slowed


@pytest.mark.parametrize(
    ("rate", "newer", "left", "drops"),
    [
        (1e8, 1e9, math.inf, True),  # no deadline: only the newest counts
        (1e8, 1e9, 13.0, True),
        (1e8, 1e9, 12.0, False),  # it might not fit: the one under way does
        (0.0, 1e9, 1.0, True),  # nothing is lost yet
    ],
)
def test_a_copy_under_way_is_dropped_only_for_what_fits(
    rate: float, newer: float, left: float, drops: bool
) -> None:
    assert drops_for_newer(rate, newer, left) is drops


def test_a_rate_is_kept_on_the_average() -> None:
    now, throttle = 0.0, Throttle(50e6, 0.0)
    for _ in range(250):
        now += 0.01
        now += throttle.pause(4_000_000, now, slowed=False)
    assert 18 <= now <= 21  # a gigabyte


def test_pauses_grow_while_it_is_slowed_and_end_after_it() -> None:
    now, throttle, pauses = 0.0, Throttle(0.0, 0.0), []
    for turn in range(40):
        now += 0.1
        pauses.append(throttle.pause(4_000_000, now, slowed=turn < 20))
        now += pauses[-1]
    assert pauses[0] > 0
    assert max(pauses) <= MAX_EASE * 0.1 + 1e-6
    assert pauses[10] > pauses[0]
    assert pauses[-1] == 0.0
