"""What follows a failed incarnation: how long to wait, and which checkpoint to resume from."""

from __future__ import annotations

import random

from elastic_ckpt.jobdir.node_record import FailureRecord
from elastic_ckpt.journal.events import Crashed
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.failure import Failure
from elastic_ckpt.policy.restart import RestartAction, RestartDecision, RestartPolicy
from elastic_ckpt.supervisor.ports import Clock, DirectoryPort, MemoryPort
from elastic_ckpt.supervisor.run_record import RunRecord


class Restarts:
    """Counts failures by the policy; sets aside a checkpoint that a step keeps failing after. The
    back-off is over at ``retry_at``, in monotonic seconds."""

    def __init__(
        self,
        max_failures: int,
        clock: Clock,
        directory: DirectoryPort,
        memory: MemoryPort,
        journal: Journal,
    ) -> None:
        self.policy = RestartPolicy(max_failures)
        self.retry_at = 0.0
        self._clock = clock
        self._directory = directory
        self._memory = memory
        self._journal = journal
        self._jitter = random.Random()
        self._why_older = ""

    def write_off(self, failure: Failure, record: RunRecord, restart_step: int) -> None:
        """Journal and record what failed; the next incarnation resumes from ``restart_step``."""
        record.node.last_failure = FailureRecord(
            failure.rank, failure.kind.value, failure.message, failure.tail, self._clock.wall()
        )
        self._journal.write(
            Crashed(
                rank=failure.rank,
                kind=failure.kind.value,
                exit_code=failure.exit_code,
                message=failure.message,
                tail=failure.tail,
                restart_step=restart_step,
            )
        )

    def decide(self, failure: Failure) -> tuple[RestartDecision, float]:
        """Return what follows from a failure, and the seconds until it does."""
        decision = self.policy.decide(failure)
        if decision.action is RestartAction.FALL_BACK:
            self._why_older = decision.why
            self._memory.hurry()
        delay = self.policy.backoff_seconds(self._jitter)
        self.retry_at = self._clock.monotonic() + delay
        return decision, delay

    def may_begin(self, now: float) -> bool:
        """Return whether the back-off is over; what is to be set aside must be on disk first."""
        return now >= self.retry_at and (not self._why_older or self._memory.over)

    def take_an_older_one(self, record: RunRecord, session: str) -> None:
        """Set a session's newest checkpoint aside, if the policy says so and there is an older."""
        why, self._why_older = self._why_older, ""
        if why:
            line = self._directory.fall_back(why, self._memory.forget, session)
            if line:
                record.say(line)
