"""Which of several notices sets the deadline, and when to kill the workers before it."""

from __future__ import annotations

from itertools import permutations

import pytest

from elastic_ckpt.policy.deadline import Notice, is_by_hand, kill_time, tightest

EARLY = Notice("slurm", "SIGUSR1", 90.0)
LATE = Notice("signal", "SIGTERM", 120.0)
LATER = Notice("aws", "rebalance", 300.0)


def test_the_first_notice_sets_the_deadline() -> None:
    assert tightest(None, LATE) is LATE


def test_the_earliest_deadline_wins_in_any_order() -> None:
    for order in permutations([EARLY, LATE, LATER]):
        current = None
        for notice in order:
            current = tightest(current, notice)
        assert current is EARLY


def test_a_repeated_notice_changes_nothing() -> None:
    repeat = Notice("file", "again", EARLY.deadline)
    assert tightest(EARLY, repeat) is EARLY


@pytest.mark.parametrize("known", [60.0, 240.0])
def test_a_known_deadline_replaces_a_guess_but_not_vice_versa(known: float) -> None:
    guess = Notice("signal", "SIGTERM", 120.0, is_guess=True)
    answer = Notice("slurm", "preempted", known)
    assert tightest(guess, answer) is answer
    assert tightest(answer, guess) is answer


@pytest.mark.parametrize(
    ("grace", "margin"),
    [(120.0, 1.0), (10.0, 1.0), (9.0, 0.9), (2.0, 0.2), (0.0, 0.0), (-5.0, 0.0)],
)
def test_workers_are_killed_a_tenth_of_the_grace_or_one_second_before_the_deadline(
    grace: float, margin: float
) -> None:
    assert kill_time(LATE, grace) == pytest.approx(LATE.deadline - margin)


@pytest.mark.parametrize(
    ("source", "reason", "is_a_persons"),
    [
        ("signal", "SIGINT", True),
        ("signal", "SIGHUP", True),
        ("signal", "SIGTERM", False),
        ("slurm", "preempted", False),
        ("aws", "SIGINT", False),
    ],
)
def test_only_a_terminal_ends_the_whole_job(source: str, reason: str, is_a_persons: bool) -> None:
    assert is_by_hand(Notice(source, reason, 90.0)) is is_a_persons
