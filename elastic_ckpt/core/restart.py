"""When to start again after a failure, and after how long."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

FIRST_BACKOFF_SECONDS: Final = 0.5
MAX_BACKOFF_SECONDS: Final = 60.0
REFILL_STEPS: Final = 1000
"""Steps without a failure after which the whole budget is given back."""


@dataclass(frozen=True)
class Failure:
    """One incarnation that ended badly.

    Attributes:
        rank: the rank that went first, or -1 when it was not a worker.
        exit_code: its exit code; negative is the signal that killed it.
        message: one line.
        stepped: whether any rank of the incarnation had begun a step.
        steps: steps finished in the incarnation.
    """

    rank: int
    exit_code: int
    message: str
    stepped: bool
    steps: int = 0

    @property
    def retryable(self) -> bool:
        """False for an error at start-up (bad import, bad arguments): it would come again.

        A worker that was killed by a signal, or lost its agent, did not fail by itself.
        """
        return self.stepped or self.exit_code <= 0


@dataclass
class RestartBudget:
    """Failures are counted and backed off; preemptions never touch this.

    Attributes:
        max_failures: failures that are retried before steady progress refills the budget.
        failures: failures since the budget was last full.
        total: failures since the run began.
        stuck: failures in a row in whose incarnations no step was finished.
    """

    max_failures: int
    failures: int = 0
    total: int = 0
    stuck: int = 0

    @property
    def left(self) -> int:
        """Failures that will still be retried."""
        return max(0, self.max_failures - self.failures)

    def spend(self, failure: Failure) -> bool:
        """Count a failure; False when the job must stop."""
        if failure.steps >= REFILL_STEPS:
            self.failures = 0
        self.stuck = 0 if failure.steps > 0 else self.stuck + 1
        self.failures += 1
        self.total += 1
        return failure.retryable and self.failures <= self.max_failures

    def backoff_seconds(self, jitter: random.Random) -> float:
        """Seconds to wait now: none while steps are finished, then doubling, with jitter."""
        if self.stuck <= 1:
            return 0.0
        base = FIRST_BACKOFF_SECONDS * 2.0 ** min(self.stuck - 2, 16)
        return min(base, MAX_BACKOFF_SECONDS) * jitter.uniform(0.5, 1.0)
