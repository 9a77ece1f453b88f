"""A stopped process is continued, the next time killed; a suspended job is left alone."""

from __future__ import annotations

import pytest

from elastic_ckpt.policy.process_state import (
    STUCK_SECONDS,
    URGENT_SECONDS,
    ProcessStates,
    Remedy,
)

AGENT, RANK_0, RANK_1 = 9, 10, 11


def states(rank_1: str = "S", *, rank_0: str = "S", agent: str = "S") -> dict[int, str]:
    return {AGENT: agent, RANK_0: rank_0, RANK_1: rank_1}


def test_a_stopped_worker_is_continued_within_seconds_and_killed_the_next_time() -> None:
    rule = ProcessStates()
    assert rule.judge(states("T"), 100.0) == {}
    assert rule.judge(states("T"), 100.0 + STUCK_SECONDS - 1) == {}
    assert rule.judge(states("T"), 100.0 + STUCK_SECONDS) == {RANK_1: Remedy.CONTINUE}
    assert rule.judge(states(), 106.0) == {}
    assert rule.judge(states("T"), 120.0) == {}
    assert rule.judge(states("T"), 126.0) == {RANK_1: Remedy.KILL}
    assert rule.judge(states("T"), 127.0) == {}  # once


def test_a_worker_that_is_stopped_again_much_later_is_continued_again() -> None:
    rule = ProcessStates()
    for now in (100.0, 200.0, 300.0):
        rule.judge(states("T"), now)
        assert rule.judge(states("T"), now + 6) == {RANK_1: Remedy.CONTINUE}
        assert rule.judge(states(), now + 7) == {}


def test_on_a_notice_nothing_that_is_stopped_is_killed() -> None:
    """An agent that was continued before has to serve it; killed, it would lose the save."""
    rule = ProcessStates()
    rule.judge(states(agent="T"), 100.0)
    assert rule.judge(states(agent="T"), 105.0) == {AGENT: Remedy.CONTINUE}
    rule.judge(states(agent="T"), 110.0, urgent=True)
    for now in (111.0, 113.0, 115.0):
        assert rule.judge(states(agent="T"), now, urgent=True) == {AGENT: Remedy.CONTINUE}
        rule.judge(states(agent="T"), now + 1.0, urgent=True)


@pytest.mark.parametrize("state", ["Z", "X"])
def test_a_zombie_is_killed(state: str) -> None:
    rule = ProcessStates()
    rule.judge(states(state), 100.0)
    assert rule.judge(states(state), 106.0) == {RANK_1: Remedy.KILL}


def test_a_stopped_agent_is_continued() -> None:
    """It could not serve a notice."""
    rule = ProcessStates()
    rule.judge(states(agent="T"), 100.0)
    assert rule.judge(states(agent="T"), 106.0) == {AGENT: Remedy.CONTINUE}


def test_a_short_stop_is_left_alone() -> None:
    rule = ProcessStates()
    for now in range(100, 200, 4):
        assert rule.judge(states("T"), now) == {}
        assert rule.judge(states(), now + 2) == {}


def test_a_job_that_is_suspended_as_a_whole_is_left_alone() -> None:
    rule = ProcessStates()
    suspended = states("T", rank_0="T", agent="T")
    for now in (100.0, 110.0, 5000.0):
        assert rule.judge(suspended, now) == {}
        assert rule.suspended
    assert rule.judge(states("T"), 5001.0) == {}  # the others continue a moment earlier
    assert rule.judge(states(), 5002.0) == {}
    assert not rule.suspended


def test_on_a_notice_a_suspended_job_is_continued_at_once() -> None:
    rule = ProcessStates()
    suspended = states("T", rank_0="T", agent="T")
    rule.judge(suspended, 100.0)
    rule.judge(suspended, 101.0, urgent=True)
    due = rule.judge(suspended, 101.0 + URGENT_SECONDS, urgent=True)
    assert due == dict.fromkeys((AGENT, RANK_0, RANK_1), Remedy.CONTINUE)


def test_a_process_that_a_debugger_holds_is_left_alone() -> None:
    rule = ProcessStates()
    for now in (100.0, 110.0, 500.0):
        assert rule.judge(states("t"), now) == {}
        assert rule.suspended


def test_time_that_was_not_looked_at_does_not_count() -> None:
    rule = ProcessStates()
    rule.judge(states("T"), 100.0)
    rule.forget()
    assert rule.judge(states("T"), 5000.0) == {}
