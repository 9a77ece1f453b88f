"""When a failure is retried, and after how long."""

from __future__ import annotations

import random

import pytest

from elastic_ckpt.core.restart import (
    FIRST_BACKOFF_SECONDS,
    MAX_BACKOFF_SECONDS,
    REFILL_STEPS,
    Failure,
    RestartBudget,
)


def crash(steps: int = 10, exit_code: int = -9, *, stepped: bool = True) -> Failure:
    return Failure(rank=1, exit_code=exit_code, message="", stepped=stepped, steps=steps)


@pytest.mark.parametrize(
    ("exit_code", "stepped", "retryable"),
    [
        (1, False, False),  # a bad import: it would come again
        (2, False, False),
        (1, True, True),
        (-9, False, True),  # killed: not its own doing
        (-11, True, True),
        (0, False, True),  # it left without a word
    ],
)
def test_an_error_at_start_up_is_not_retried(
    exit_code: int, stepped: bool, retryable: bool
) -> None:
    failure = crash(exit_code=exit_code, stepped=stepped)
    assert failure.retryable is retryable
    assert RestartBudget(max_failures=3).spend(failure) is retryable


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_a_budget_of_n_retries_n_failures_in_a_row(allowed: int) -> None:
    budget = RestartBudget(allowed)
    verdicts = []
    left = []
    for _ in range(allowed + 2):
        verdicts.append(budget.spend(crash()))
        left.append(budget.left)
    assert verdicts == [True] * allowed + [False, False]
    assert left == [*range(allowed - 1, -1, -1), 0, 0]
    assert budget.total == allowed + 2


def test_steady_progress_gives_the_whole_budget_back() -> None:
    budget = RestartBudget(2)
    assert budget.spend(crash())
    assert budget.spend(crash(steps=REFILL_STEPS - 1))
    assert budget.left == 0
    assert budget.spend(crash(steps=REFILL_STEPS))
    assert (budget.failures, budget.left, budget.total) == (1, 1, 3)


def test_a_failure_that_is_not_retried_counts_all_the_same() -> None:
    budget = RestartBudget(2)
    assert not budget.spend(crash(exit_code=1, stepped=False))
    assert (budget.failures, budget.total) == (1, 1)


class _Longest(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return b


class _Shortest(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return a


@pytest.mark.parametrize(
    ("stuck", "longest"),
    [
        (0, 0.0),
        (1, 0.0),
        (2, FIRST_BACKOFF_SECONDS),
        (3, 2 * FIRST_BACKOFF_SECONDS),
        (5, 8 * FIRST_BACKOFF_SECONDS),
        (8, 64 * FIRST_BACKOFF_SECONDS),
        (9, MAX_BACKOFF_SECONDS),
        (10_000, MAX_BACKOFF_SECONDS),
    ],
)
def test_the_back_off_doubles_up_to_a_limit_with_jitter(stuck: int, longest: float) -> None:
    """Counted are the failures in a row in which no step was finished."""
    budget = RestartBudget(20_000)
    for _ in range(stuck):
        budget.spend(crash(steps=0))
    assert budget.backoff_seconds(_Longest()) == longest
    assert budget.backoff_seconds(_Shortest()) == longest / 2
    seconds = [budget.backoff_seconds(random.Random(seed)) for seed in range(50)]
    assert all(longest / 2 <= each <= longest for each in seconds)
    assert len(set(seconds)) > 40 or not longest


def test_a_finished_step_ends_the_back_off_but_not_the_count() -> None:
    budget = RestartBudget(5)
    for _ in range(3):
        budget.spend(crash(steps=0))
    assert budget.backoff_seconds(_Longest()) > 0
    budget.spend(crash(steps=1))
    assert budget.backoff_seconds(_Longest()) == 0.0
    assert budget.left == 1
    budget.spend(crash(steps=0))
    budget.spend(crash(steps=0))
    assert budget.backoff_seconds(_Longest()) == FIRST_BACKOFF_SECONDS
