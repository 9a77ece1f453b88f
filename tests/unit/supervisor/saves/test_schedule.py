"""When the supervisor asks for saves; its clock is a number."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.policy.interval import FIRST_SAVE_SECONDS, SaveInterval, daly_interval
from elastic_ckpt.supervisor.saves.schedule import SaveSchedule
from tests.journals import happened

HOUR = 3600.0
AUTO = SaveInterval(auto=True)
WALL = 1e9
"""Seconds since the epoch at which the monotonic clock of these tests is 0."""


def event(name: str, at: float, **data: Any) -> JournalEntry:
    return happened(WALL + at, name, data, monotonic=at, node="here")


def saved(at: float, cost: float) -> JournalEntry:
    return event("saved", at, step=1, seconds=cost, stall_seconds=cost)


def running(at: float) -> JournalEntry:
    return event("state", at, state="running")


def due_times(schedule: SaveSchedule, since: float, until: float, step: float = 1.0) -> list[float]:
    """Return when saves are due, polling every ``step`` seconds."""
    looks = int((until - since) / step)
    return [since + step * n for n in range(looks) if schedule.due(since + step * n)]


def started(interval: SaveInterval, mtbf: float = HOUR, *events: JournalEntry) -> SaveSchedule:
    schedule = SaveSchedule(interval, mtbf, events)
    schedule.begin(0.0, WALL)
    return schedule


@pytest.mark.parametrize("interval", [SaveInterval(), SaveInterval(steps=10)])
def test_no_interval_requests_no_save(interval: SaveInterval) -> None:
    schedule = started(interval)
    assert due_times(schedule, 0, 10_000) == []
    assert schedule.optimal is None


def test_given_seconds_are_kept_whatever_saves_cost() -> None:
    schedule = started(SaveInterval(seconds=100.0))
    schedule.learn(saved(50, 90.0))
    assert due_times(schedule, 51, 400) == [100, 200, 300]


def test_nothing_is_due_before_the_first_step() -> None:
    assert not SaveSchedule(SaveInterval(seconds=1.0), HOUR).due(1e9)


def test_first_save_comes_soon_to_measure_its_cost() -> None:
    schedule = started(AUTO)
    assert due_times(schedule, 0, FIRST_SAVE_SECONDS + 1) == [FIRST_SAVE_SECONDS]
    assert schedule.optimal is not None and "to measure" in schedule.optimal.why
    schedule.learn(running(0))
    schedule.learn(saved(62, 2.0))
    seconds = schedule.optimal.seconds
    assert seconds == pytest.approx(daly_interval(2.0, HOUR + 62.0))
    assert "a save costs 2 s and the job fails every 61 min" in schedule.optimal.why
    # The interval counts from the beginning of the save, at 60.
    assert due_times(schedule, 62, 60 + seconds - 2) == []
    assert len(due_times(schedule, 60 + seconds - 2, 60 + seconds + 2)) == 1


def test_a_save_for_another_reason_puts_the_next_one_off() -> None:
    schedule = started(AUTO, HOUR, saved(-100, 2.0))
    assert schedule.optimal is not None
    seconds = schedule.optimal.seconds
    schedule.learn(saved(seconds - 10, 2.0))
    assert due_times(schedule, seconds - 10, 2 * seconds - 20) == []


def test_interval_continues_after_a_failed_save() -> None:
    schedule = started(AUTO, HOUR, saved(-100, 2.0))
    assert schedule.optimal is not None
    seconds = schedule.optimal.seconds
    assert len(due_times(schedule, 0, 5 * seconds + 5)) == 5


def test_what_earlier_runs_journaled_is_known_from_the_start() -> None:
    """Two crashes in 2 h, expected was one in 1 h: (1 h + 2 h) / 3."""
    crash = [event("ended", -1, kind="crashed"), event("crash", -1)]
    history = [
        running(-2 * HOUR - 1), saved(-2 * HOUR, 0.4), event("crash", -HOUR - 1),
        running(-HOUR - 1), *crash,
    ]  # fmt: skip
    schedule = started(AUTO, HOUR, *history)
    assert schedule.optimal is not None
    assert "a save costs 0.4 s and the job fails every 60 min" in schedule.optimal.why


def test_crashes_shorten_the_interval_and_saved_preemptions_do_not() -> None:
    def after(*events: JournalEntry) -> float:
        schedule = started(AUTO, HOUR, saved(-10, 2.0), running(0))
        for each in events:
            schedule.learn(each)
        schedule.learn(saved(1000, 2.0))
        assert schedule.optimal is not None
        return schedule.optimal.seconds

    calm = after()
    preempted = after(
        event("notice", 400), saved(401, 2.0), event("ended", 402, kind="stopped"),
        event("end", 403, exit_code=75), event("start", 500), running(501),
    )  # fmt: skip
    crashed = after(event("ended", 400, kind="crashed"), event("crash", 400), running(401))
    assert preempted == pytest.approx(calm, rel=0.02)  # 100 s in the queue are not observed
    assert crashed < 0.8 * calm


def test_one_slow_save_moves_nothing() -> None:
    schedule = started(AUTO, HOUR, *(saved(-10, 2.0) for _ in range(5)))
    before = schedule.optimal
    assert before is not None
    schedule.learn(saved(10, 200.0))
    assert schedule.optimal is not None and schedule.optimal.seconds == before.seconds
    for number in range(3):
        schedule.learn(saved(20 + number, 200.0))
    assert schedule.optimal.seconds > 2 * before.seconds


@pytest.mark.parametrize("cost", [None, "2", -1.0, float("nan"), float("inf"), 1e300, []])
def test_a_cost_that_makes_no_sense_is_not_counted(cost: Any) -> None:
    schedule = started(AUTO)
    schedule.learn(event("saved", 10, step=1, stall_seconds=cost))
    assert schedule.optimal is not None
    assert schedule.optimal.seconds == FIRST_SAVE_SECONDS
