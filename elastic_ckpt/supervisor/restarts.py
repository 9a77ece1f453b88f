"""What follows a failed incarnation: how long to wait, and which checkpoint to resume from."""

from __future__ import annotations

import random
from typing import Final

from elastic_ckpt.jobdir.node_record import FailureRecord
from elastic_ckpt.journal.events import Crashed
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.failure import Failure
from elastic_ckpt.policy.restart import RestartAction, RestartDecision, RestartPolicy
from elastic_ckpt.supervisor.ports import Clock, DirectoryPort, MemoryPort
from elastic_ckpt.supervisor.run_record import RunRecord
from elastic_ckpt.util.journald import warning

FALL_BACK_SECONDS: Final = 60.0
"""How long the storage may take to begin to set a checkpoint aside."""


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
        self._asked_at: float | None = None  # the directory, to set a checkpoint aside

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
                node=failure.node or ", ".join(failure.lost),
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

    def take_an_older_one(self, record: RunRecord, session: str) -> bool:
        """Set a session's newest checkpoint aside, if the policy says so and there is an older.

        Called again until it returns True: it is done, or the storage did not answer in time.
        """
        why, now = self._why_older, self._clock.monotonic()
        if not why:
            return True
        if self._asked_at is None:
            self._asked_at = now
            self._directory.fall_back(why, self._memory.forget, session)
        line = self._directory.fallen_back
        if line is None and not self._gives_up(now, record):
            return False
        self._why_older, self._asked_at = "", None
        if line is None:
            line = f"{why}: the storage does not answer, resuming from the newest checkpoint"
        if line:
            record.say(warning(line))
        return True

    def _gives_up(self, now: float, record: RunRecord) -> bool:
        """Return whether the fall-back is cancelled; one that is under way has to be waited for."""
        if self._asked_at is None or now - self._asked_at < FALL_BACK_SECONDS:
            return False
        if self._directory.cancel_fall_back():
            return True
        message = "waiting for the storage, which does not answer, to set a checkpoint aside"
        if record.node.message != message:
            record.update(message=message)
            record.say(warning(message))
        return False
