"""Who leads after a head is lost."""

from __future__ import annotations

import pytest

from elastic_ckpt.protocol.cluster import JobState
from elastic_ckpt.protocol.succession import (
    MAX_POSITION,
    NO_POSITION,
    STAGGER_SECONDS,
    Follow,
    Lead,
    Leader,
    Leave,
    Succession,
    position,
)

LEASE = 8.0
OLD = Leader(4, "n1", "n1:29400", b"a 7")


def at(one: Succession, *looks: tuple[float, Leader | None]) -> list[tuple[float, object]]:
    """Return what it decides, and when."""
    found = [(now, one.judge(leader, now)) for now, leader in looks]
    return [(now, decided) for now, decided in found if decided is not None]


def steadily(leader: Leader, since: float, until: float) -> list[tuple[float, Leader]]:
    return [(since + 0.5 * turn, leader) for turn in range(int(2 * (until - since)) + 1)]


@pytest.mark.parametrize(
    ("place", "seconds"),
    [(1, LEASE), (2, LEASE + STAGGER_SECONDS), (5, LEASE + 4 * STAGGER_SECONDS)],
)
def test_nodes_wait_for_the_lease_and_one_after_another(place: int, seconds: float) -> None:
    one = Succession("n1:29400", place, LEASE)
    when, decided = at(one, *steadily(OLD, 100.0, 120.0))[0]
    assert decided == Lead(OLD) and when == 100.0 + seconds


def test_no_node_waits_forever_for_those_before_it() -> None:
    one = Succession("n1:29400", 5000, LEASE)
    when, _ = at(one, *steadily(OLD, 0.0, 60.0))[0]
    assert when == LEASE + (MAX_POSITION - 1) * STAGGER_SECONDS


def test_head_that_beats_is_waited_for() -> None:
    """Only the link to it is cut; when it stops, its lease begins anew."""
    one = Succession("n1:29400", 1, LEASE)
    beats = [(float(now), Leader(4, "n1", "n1:29400", str(now // 2).encode())) for now in range(31)]
    assert at(one, *beats) == []
    when, _ = at(one, *steadily(beats[-1][1], 31.0, 60.0))[0]
    assert when == 30.0 + LEASE


def test_head_that_has_passed_the_job_on_is_not_waited_for() -> None:
    left = Leader(4, "n1", "n1:29400", b"a 7", ended=True, passed_on=True)
    assert at(Succession("n1:29400", 1, LEASE), (3.0, OLD), (3.5, left)) == [(3.5, Lead(left))]
    second = Succession("n1:29400", 2, LEASE)
    assert at(second, (3.0, left), (3.5, left), (4.0, left)) == [(4.0, Lead(left))]


def test_job_that_was_ended_has_no_next_head() -> None:
    ended = Leader(4, "n1", "n1:29400", b"a 7", ended=True)
    assert at(Succession("n1:29400", 1, LEASE), *steadily(ended, 0.0, 60.0)) == []


def test_node_leaves_a_job_that_ends_while_it_looks_for_the_head() -> None:
    """Two nodes waited for each other: one had come for a head that ended the job just then, and
    was itself where the nodes of the next run were to meet."""
    ended = Leader(4, "n1", "n1:29400", b"a 7", ended=True)
    for place in (NO_POSITION, 1, 2):
        one = Succession("n1:29400", place, LEASE)
        assert at(one, (0.0, OLD), (0.5, ended)) == [(0.5, Leave(ended))]


def test_next_head_is_followed_once_it_lives() -> None:
    new = Leader(5, "n2", "n2:29400", b"b 1")
    for place in (NO_POSITION, 1, 2):
        one = Succession("n1:29400", place, LEASE)
        assert at(one, (0.0, OLD), (0.5, new)) == [(0.5, Follow(new))]


def test_record_of_a_run_that_was_killed_long_ago_is_not_followed() -> None:
    one = Succession("n2:29400", NO_POSITION, LEASE)
    assert at(one, *steadily(OLD, 0.0, 60.0)) == []
    lives = Leader(4, "n1", "n1:29400", b"a 8")
    assert at(one, (61.0, lives)) == [(61.0, Follow(lives))]


def test_node_that_never_was_in_the_job_does_not_lead() -> None:
    assert at(Succession("n1:29400", NO_POSITION, LEASE), *steadily(OLD, 0.0, 60.0)) == []


def test_silence_of_the_storage_is_not_the_heads() -> None:
    """The head may not have reached it either: its lease begins when the storage answers again."""
    one = Succession("n1:29400", 1, LEASE)
    assert at(one, (0.0, OLD), *[(float(now), None) for now in range(1, 30)], (30.0, OLD)) == []
    when, _ = at(one, *steadily(OLD, 30.5, 60.0))[0]
    assert when == 30.0 + LEASE


def test_head_alone_takes_the_job_back_after_all_others() -> None:
    mine = Leader(4, "n1", "n1:29400", b"a 7", ended=True, passed_on=True)
    one = Succession("n1:29400", 3, LEASE)
    when, decided = at(one, *steadily(mine, 0.0, 20.0))[0]
    assert decided == Lead(mine) and when == 2 * STAGGER_SECONDS


def test_order_of_succession_is_that_of_the_roster_and_then_of_joining() -> None:
    job = JobState(run_id="1", job="j", identity="i", head="n1", roster=(0, 3, 2))
    assert [position(job, number) for number in (0, 3, 2)] == [0, 1, 2]
    assert [position(job, number) for number in (1, 4, 5)] == [3, 4, 5]
