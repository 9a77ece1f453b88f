"""What follows from a failure: a restart, an older checkpoint, or the end. And after how long.

Preemptions and changes of membership never use up the budget.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from elastic_ckpt.policy.failure import Failure, FailureClass

FIRST_BACKOFF_SECONDS: Final = 0.5
MAX_BACKOFF_SECONDS: Final = 60.0
REFILL_STEPS: Final = 1000
"""Steps without a failure after which the whole budget is given back."""

FALL_BACK_AT: Final = 2
STOP_AT: Final = 3
"""Failures of one step in a row, at which an older checkpoint is taken, or the job stops."""


@dataclass(frozen=True)
class Rule:
    """What a class of failures means.

    Attributes:
        may_pass: whether it may be gone at the next start although no step was begun.
        is_the_steps: whether it speaks against the step: it would come again from the same state.
        advice: what to do about it, in the message that ends the job; may be empty.
        counts: whether it uses up the budget.
    """

    may_pass: bool
    is_the_steps: bool
    advice: str = ""
    counts: bool = True


RULES: Final[Mapping[FailureClass, Rule]] = {
    FailureClass.MEMBERSHIP: Rule(may_pass=True, is_the_steps=False, counts=False),
    FailureClass.START_UP: Rule(may_pass=False, is_the_steps=False),
    FailureClass.ERROR: Rule(may_pass=True, is_the_steps=True),
    FailureClass.NON_FINITE: Rule(
        may_pass=True, is_the_steps=True, advice="look at the data of that step, or lower the "
        "learning rate",
    ),
    FailureClass.DEVICE_MEMORY: Rule(
        may_pass=False, is_the_steps=True, advice="make micro-batches smaller",
    ),
    FailureClass.HOST_MEMORY: Rule(
        may_pass=True, is_the_steps=False, advice="give the job more memory, or fewer DataLoader "
        "workers",
    ),
    FailureClass.FAULT: Rule(may_pass=True, is_the_steps=True),
    FailureClass.SIGNAL: Rule(may_pass=True, is_the_steps=False),
    FailureClass.HANG: Rule(
        may_pass=True, is_the_steps=True, advice="the journal has every worker's stack",
    ),
    FailureClass.STORAGE: Rule(
        may_pass=True, is_the_steps=False, advice="mend the storage and run again",
    ),
}  # fmt: skip


class Action(Enum):
    """What the supervisor does."""

    RESTART = "restart"  # from the newest valid checkpoint
    FALL_BACK = "fall-back"  # from the one before it; the newest is set aside
    STOP = "stop"


@dataclass(frozen=True)
class Decision:
    """What follows.

    Attributes:
        why: why it stops, or takes an older checkpoint; empty for a plain restart.
    """

    action: Action
    why: str = ""


@dataclass
class RestartPolicy:
    """Counts failures, and decides.

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
    _step: int = field(default=0, repr=False)
    _times: int = field(default=0, repr=False)  # that step has failed, in a row

    @property
    def left(self) -> int:
        """Failures that will still be retried."""
        return max(0, self.max_failures - self.failures)

    def decide(self, failure: Failure) -> Decision:
        """Count a failure, and say what follows from it."""
        rule = RULES[failure.kind]
        if failure.steps >= REFILL_STEPS:
            self.failures = 0
        self.stuck = 0 if failure.steps > 0 else self.stuck + 1
        if not rule.counts:
            return Decision(Action.RESTART)
        self.failures += 1
        self.total += 1
        advice = f"; {rule.advice}" if rule.advice else ""
        if not failure.stepped and not rule.may_pass:
            return Decision(Action.STOP, f"no retry{advice}")
        times = self._same_step(failure) if rule.is_the_steps else 0
        if times >= STOP_AT:
            return Decision(Action.STOP, f"step {failure.step} failed {times} times{advice}")
        if self.failures > self.max_failures:
            plural = "s" if self.total > 1 else ""
            return Decision(Action.STOP, f"{self.total} failure{plural}{advice}")
        if times == FALL_BACK_AT:
            return Decision(Action.FALL_BACK, f"step {failure.step} failed twice")
        return Decision(Action.RESTART)

    def backoff_seconds(self, jitter: random.Random) -> float:
        """Seconds to wait now: none while steps are finished, then doubling, with jitter."""
        if self.stuck <= 1:
            return 0.0
        base = FIRST_BACKOFF_SECONDS * 2.0 ** min(self.stuck - 2, 16)
        return min(base, MAX_BACKOFF_SECONDS) * jitter.uniform(0.5, 1.0)

    def _same_step(self, failure: Failure) -> int:
        """How often this very step has failed now, without another one that failed between."""
        if not failure.step:
            return 0
        self._times = self._times + 1 if failure.step == self._step else 1
        self._step = failure.step
        return self._times
