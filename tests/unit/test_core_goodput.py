"""The account of a job's time, on journals short enough to be added up by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from elastic_ckpt.core.goodput import Goodput, account


@dataclass
class Entry:
    """A line of a journal: seconds on the wall clock, what happened, its fields."""

    wall: float
    event: str
    data: dict[str, Any] = field(default_factory=dict)


def state(wall: float, name: str) -> Entry:
    return Entry(wall, "state", {"state": name})


def saved(wall: float, stall: float) -> Entry:
    return Entry(wall, "saved", {"step": 1, "stall_seconds": stall})


def ended(wall: float, kind: str) -> Entry:
    return Entry(wall, "ended", {"kind": kind})


def test_an_empty_journal_is_no_time_at_all() -> None:
    assert account([]) == Goodput()
    assert account([], now=100.0).fraction is None


def test_a_job_that_never_trained() -> None:
    entries = [Entry(10, "start"), Entry(12, "launch"), ended(20, "crashed"), Entry(20, "end")]
    assert account(entries) == Goodput(wall_seconds=10.0)
    assert account(entries).fraction == 0.0


def test_a_run_without_a_disturbance() -> None:
    """10 s to start, 90 s of training, 2 + 3 of them in saves, 1 s to end."""
    result = account(
        [
            Entry(0, "start"),
            state(10, "running"),
            saved(40, 2.0),
            saved(70, 3.0),
            ended(100, "completed"),
            Entry(101, "end"),
        ]
    )
    assert result == Goodput(101.0, training_seconds=85.0, stall_seconds=5.0)
    assert result.fraction == pytest.approx(85 / 101)


def test_a_crash_loses_what_came_behind_the_last_save() -> None:
    """10..60 with a save at 40 and 1 s of stall, so 29 s count; then 70..110."""
    result = account(
        [
            Entry(0, "start"),
            state(10, "running"),
            saved(40, 1.0),
            ended(60, "crashed"),
            Entry(60, "crash"),
            state(60, "backing-off"),
            state(65, "starting"),
            state(70, "running"),
            ended(110, "completed"),
            Entry(110, "end"),
        ]
    )
    assert result == Goodput(110.0, 29.0 + 40.0, stall_seconds=1.0, lost_work_seconds=20.0)


def test_a_crash_before_any_save_loses_everything_since_the_first_step() -> None:
    result = account([Entry(0, "start"), state(10, "running"), ended(30, "crashed")])
    assert result == Goodput(30.0, lost_work_seconds=20.0)


def test_a_save_counts_for_its_own_incarnation_alone() -> None:
    """The second incarnation is lost from its first step on, not from the first one's save."""
    result = account(
        [
            Entry(0, "start"),
            state(10, "running"),
            saved(20, 0.0),
            ended(25, "crashed"),
            state(40, "running"),
            ended(47, "crashed"),
        ]
    )
    assert result.lost_work_seconds == 5.0 + 7.0
    assert result.training_seconds == 10.0


def test_a_preemption_loses_nothing_and_the_time_in_the_queue_is_no_training() -> None:
    """46 s with 5 s of stall, a night in the queue, 40 s that go on."""
    entries = [
        Entry(0, "start"),
        state(10, "running"),
        Entry(50, "notice"),
        state(50, "draining"),
        saved(55, 5.0),
        ended(56, "stopped"),
        state(56, "preempted"),
        Entry(57, "end"),
        Entry(1000, "start"),
        state(1010, "running"),
    ]
    assert account(entries, now=1050.0) == Goodput(1050.0, 41.0 + 40.0, stall_seconds=5.0)
    assert account(entries) == Goodput(1010.0, 41.0, stall_seconds=5.0)


def test_a_save_before_the_first_step_stalls_no_training() -> None:
    result = account([Entry(0, "start"), saved(5, 4.0), state(10, "running")], now=20.0)
    assert result == Goodput(20.0, training_seconds=10.0)


def test_training_ends_with_the_last_save_if_the_supervisor_was_killed() -> None:
    """Nothing says when it died, but what a restart resumed from was sealed at 40."""
    result = account(
        [
            Entry(0, "start"),
            state(10, "running"),
            saved(40, 0.0),
            Entry(1000, "start"),
            state(1010, "running"),
            ended(1110, "completed"),
        ]
    )
    assert result.training_seconds == 30.0 + 100.0


def test_the_time_in_the_queue_behind_a_killed_supervisor_is_no_lost_work() -> None:
    """The last sign of life is the notice at 45."""
    result = account(
        [
            Entry(0, "start"),
            state(10, "running"),
            saved(40, 0.0),
            Entry(45, "notice"),
            Entry(1000, "start"),
        ]
    )
    assert result.lost_work_seconds == 5.0


def test_an_agent_that_died_ends_its_incarnation() -> None:
    """The supervisor itself writes the crash; there is no agent to say that it ended."""
    result = account(
        [
            Entry(0, "start"),
            state(10, "running"),
            saved(40, 0.0),
            Entry(50, "crash"),
            state(50, "backing-off"),
            state(60, "running"),
            ended(100, "completed"),
        ]
    )
    assert result == Goodput(100.0, 30.0 + 40.0, lost_work_seconds=10.0)


def test_an_incarnation_that_the_deadline_cut_off_loses_what_it_had_not_saved() -> None:
    result = account(
        [
            Entry(0, "start"),
            state(10, "running"),
            saved(40, 0.0),
            state(50, "draining"),
            state(60, "preempted"),
            Entry(60, "end"),
        ]
    )
    assert result == Goodput(60.0, 30.0, lost_work_seconds=20.0)
