"""What to do after a failure: restart, leave a node out, fall back to an older checkpoint, or stop;
and the back-off.

Preemptions and membership changes are never charged to the budget.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from elastic_ckpt.policy.failure import NOTHING_SAVED, SETTLED_SECONDS, Failure, FailureClass

FIRST_BACKOFF_SECONDS: Final = 0.5
MAX_BACKOFF_SECONDS: Final = 60.0
REFILL_STEPS: Final = 1000
"""Steps without a failure after which the budget is full again, also where nothing is saved."""

QUICK_SECONDS: Final = 3.0
"""A start that fails sooner is a typing error or a missing module: a retry would fail as well."""

_WRONG_USE: Final = "UsageError"

FALL_BACK_AT: Final = 2
STOP_AT: Final = 3
"""Consecutive failures of the same step at which the job falls back, or stops."""

BLAME_AT: Final = 3
LAST_RESORT_BLAME_AT: Final = 2
"""Consecutive failures of one node's workers at which the job leaves that node out; the second is
for a job that would fall back or stop otherwise."""

BLAME_SECONDS: Final = 6 * 3600.0
"""Older failures of a node do not count: the expected time between failures, if none is given."""


@dataclass(frozen=True)
class Rule:
    """How to treat a class of failures.

    Attributes:
        may_pass: whether a retry may help even if no step was started.
        is_the_steps: whether the step may be to blame, so that the same state fails again.
        advice: what the user can do, for the message that ends the job; may be empty.
        counts: whether it is charged to the budget.
        is_the_nodes: whether the node may be to blame whose worker failed first.
    """

    may_pass: bool
    is_the_steps: bool
    advice: str = ""
    counts: bool = True
    is_the_nodes: bool = True


RULES: Final[Mapping[FailureClass, Rule]] = {
    FailureClass.MEMBERSHIP: Rule(
        may_pass=True, is_the_steps=False, counts=False, is_the_nodes=False,
    ),
    FailureClass.LAUNCH: Rule(may_pass=False, is_the_steps=False),
    FailureClass.START_UP: Rule(may_pass=False, is_the_steps=False),
    FailureClass.ERROR: Rule(may_pass=True, is_the_steps=True),
    FailureClass.NON_FINITE: Rule(
        may_pass=True, is_the_steps=True, advice="look at the data of that step, or lower the "
        "learning rate", is_the_nodes=False,
    ),
    FailureClass.DEVICE_MEMORY: Rule(
        may_pass=False, is_the_steps=True, advice="use smaller micro-batches",
    ),
    FailureClass.HOST_MEMORY: Rule(
        may_pass=True, is_the_steps=False, advice="give the job more memory, or fewer DataLoader "
        "workers",
    ),
    FailureClass.FAULT: Rule(may_pass=True, is_the_steps=True),
    FailureClass.SIGNAL: Rule(may_pass=True, is_the_steps=False),
    FailureClass.HANG: Rule(
        may_pass=True, is_the_steps=True, advice="the report shows each rank's stack",
    ),
    FailureClass.STORAGE: Rule(
        may_pass=True, is_the_steps=False, advice="fix the storage, then rerun the same command",
        is_the_nodes=False,
    ),
}  # fmt: skip


class RestartAction(Enum):
    """What the supervisor does after a failure."""

    RESTART = "restart"  # from the newest intact checkpoint
    LEAVE_OUT = "leave-out"  # the same, without the node whose workers failed first
    FALL_BACK = "fall-back"  # from the previous one; the newest is quarantined
    STOP = "stop"


@dataclass(frozen=True)
class RestartDecision:
    """What to do after a failure.

    Attributes:
        why: the reason for anything but a plain restart; else empty.
        let_in: a node that was left out and is not to blame; empty for none.
    """

    action: RestartAction
    why: str = ""
    let_in: str = ""


@dataclass
class Blame:
    """Counts how often in a row the workers of one node were the first to fail."""

    node: str = ""
    times: list[float] = field(default_factory=list)  # monotonic seconds

    def count(self, node: str, at: float) -> int:
        """Count a failure of a node's workers, and return the number of those in a row."""
        recent = [one for one in self.times if at - one <= BLAME_SECONDS]
        self.times = [*recent, at] if node == self.node else [at]
        self.node = node
        return len(self.times)


@dataclass
class RestartPolicy:
    """The failure budget of one run.

    Durable progress, which is a newer checkpoint than at the failure before, refills the budget and
    clears the step that failed: the next incarnation resumes from a state that no earlier one had.

    Attributes:
        max_failures: failures in a row that are retried without durable progress between them.
        failures: failures since the budget was last full.
        total: failures since the run started.
        stuck: consecutive failures of incarnations that finished no step.
    """

    max_failures: int
    failures: int = 0
    total: int = 0
    stuck: int = 0
    _step: int = field(default=0, repr=False)
    _times: int = field(default=0, repr=False)  # consecutive failures of that step
    _has_started: bool = field(default=False, repr=False)
    _start_message: str = field(default="", repr=False)  # of the last failed start
    _furthest: tuple[int, ...] = field(default=NOTHING_SAVED, repr=False)
    _blame: Blame = field(default_factory=Blame, repr=False)
    _left_out_for: Failure | None = field(default=None, repr=False)  # the last one left out

    @property
    def left(self) -> int:
        """Number of failures that will still be retried."""
        return max(0, self.max_failures - self.failures)

    def carry_on(self, failures: int, newest: tuple[int, ...]) -> None:
        """Count the failures in a row that an earlier head has seen, after which ``newest`` was not
        sealed."""
        self.failures = failures
        self._furthest = newest

    def progressed(self, newest: tuple[int, ...], steps: int) -> None:
        """Refill the budget if ``newest`` is a newer checkpoint than any before, or if the workers
        have finished enough ``steps`` without a failure."""
        progress = newest > self._furthest
        self._furthest = max(self._furthest, newest)
        if progress:
            self._times = 0
        if progress or steps >= REFILL_STEPS:
            self.failures = 0

    def resumes_from(self, newest: tuple[int, ...]) -> None:
        """Note what the next incarnation starts from. If it is newer, it was saved before the last
        failure and sealed after it: that failure is the first one since."""
        if newest > self._furthest:
            self._furthest = newest
            self.failures, self._times = min(1, self.failures), min(1, self._times)

    def decide(self, failure: Failure) -> RestartDecision:
        """Count a failure and return what to do.

        A node is left out before the job loses work to it: before it falls back, or stops. If it
        was not to blame, another node fails in the same way: then the job does that, and the first
        one is let in again.
        """
        decision = self._decide(failure)
        if not failure.node or not RULES[failure.kind].is_the_nodes:
            return decision
        decision = replace(decision, let_in=self._cleared(failure))
        times = self._blame.count(failure.node, failure.at)
        is_plain = decision.action is RestartAction.RESTART
        if times < (BLAME_AT if is_plain else LAST_RESORT_BLAME_AT):
            return decision
        if not is_plain and not failure.dispensable:
            return decision
        self._blame, self._left_out_for = Blame(), failure
        if not is_plain:
            self._times = max(0, self._times - 1)
        why = f"its workers were the first to fail {times} times in a row"
        return replace(decision, action=RestartAction.LEAVE_OUT, why=why)

    def _cleared(self, failure: Failure) -> str:
        """Return the node that was left out last if another one fails alike, from the same
        checkpoint."""
        last, self._left_out_for = self._left_out_for, None
        if last is None or failure.node == last.node or failure.newest != last.newest:
            return ""
        is_same_step = failure.step == last.step or not RULES[failure.kind].is_the_steps
        return last.node if failure.kind is last.kind and is_same_step else ""

    def _decide(self, failure: Failure) -> RestartDecision:
        rule = RULES[failure.kind]
        self.progressed(failure.newest, failure.steps)
        if failure.stepped or failure.lived >= SETTLED_SECONDS:
            self._has_started, self._start_message = True, ""
        self.stuck = 0 if failure.steps > 0 else self.stuck + 1
        if not rule.counts:
            return RestartDecision(RestartAction.RESTART)
        self.failures += 1
        self.total += 1
        advice = f"; {rule.advice}" if rule.advice else ""
        if not failure.stepped and not rule.may_pass and not self._start_may_pass(failure):
            return RestartDecision(RestartAction.STOP, f"no retry{advice}")
        times = self._same_step(failure) if rule.is_the_steps else 0
        if times >= STOP_AT:
            return RestartDecision(
                RestartAction.STOP, f"step {failure.step} failed {times} times{advice}"
            )
        if self.failures > self.max_failures:
            plural = "s" if self.total > 1 else ""
            return RestartDecision(RestartAction.STOP, f"{self.total} failure{plural}{advice}")
        if times == FALL_BACK_AT:
            return RestartDecision(RestartAction.FALL_BACK, f"step {failure.step} failed twice")
        return RestartDecision(RestartAction.RESTART)

    def backoff_seconds(self, jitter: random.Random) -> float:
        """Return the seconds to wait: 0 while steps finish, then doubling, with jitter."""
        if self.stuck <= 1:
            return 0.0
        base = FIRST_BACKOFF_SECONDS * 2.0 ** min(self.stuck - 2, 16)
        return min(base, MAX_BACKOFF_SECONDS) * jitter.uniform(0.5, 1.0)

    def _start_may_pass(self, failure: Failure) -> bool:
        """Return whether to retry a start that failed: if one has worked before or this one took a
        while, as a download may, and the one before it did not fail in the same way."""
        message = re.sub(r"\d+", "", failure.message)  # without pids and ports
        last, self._start_message = self._start_message, message
        if failure.kind is not FailureClass.START_UP or message == last or _WRONG_USE in message:
            return False
        return self._has_started or failure.lived >= QUICK_SECONDS

    def _same_step(self, failure: Failure) -> int:
        """Return how many times in a row this step has failed."""
        if not failure.step:
            return 0
        self._times = self._times + 1 if failure.step == self._step else 1
        self._step = failure.step
        return self._times
