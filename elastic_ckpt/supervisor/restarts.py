"""What becomes of a job that failed: how long it waits, and from which checkpoint it goes on."""

from __future__ import annotations

import contextlib
import random
import time

from elastic_ckpt.checkpoint.catalog import bypass, bypassed_and_older
from elastic_ckpt.jobdir.node_record import FailureRecord
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.failure import Failure
from elastic_ckpt.policy.restart import RestartAction, RestartDecision, RestartPolicy
from elastic_ckpt.supervisor.run_record import Account
from elastic_ckpt.supervisor.saves.memory_keeper import MemoryKeeper


class Restarts:
    """Keeps the policy's books, and sets aside the checkpoint that a step fails after.

    Attributes:
        policy: counts and decides.
    """

    def __init__(
        self, max_failures: int, job: JobDirectory, memory: MemoryKeeper, journal: Journal
    ) -> None:
        self.policy = RestartPolicy(max_failures)
        self._job = job
        self._memory = memory
        self._journal = journal
        self._jitter = random.Random()
        self._why_older = ""
        self._at = 0.0

    def write_off(self, failure: Failure, account: Account, restart_step: int) -> None:
        """Say what failed, in the journal and in the record.

        Args:
            restart_step: of the checkpoint that the next incarnation goes on from.
        """
        account.record.last_failure = FailureRecord(
            failure.rank, failure.kind.value, failure.message, failure.tail, time.time()
        )
        self._journal.write(
            "crash",
            rank=failure.rank,
            kind=failure.kind.value,
            exit_code=failure.exit_code,
            message=failure.message,
            tail=failure.tail,
            restart_step=restart_step,
        )

    def decide(self, failure: Failure) -> tuple[RestartDecision, float]:
        """What follows from a failure, and seconds until it does."""
        decision = self.policy.decide(failure)
        if decision.action is RestartAction.FALL_BACK:
            self._why_older = decision.why
            self._memory.hurry()
        delay = self.policy.backoff_seconds(self._jitter)
        self._at = time.monotonic() + delay
        return decision, delay

    def may_begin(self, now: float) -> bool:
        """Whether the wait is over; what is to be set aside must be on the disk first."""
        return now >= self._at and (not self._why_older or self._memory.over)

    def take_an_older_one(self, account: Account) -> None:
        """Set the newest checkpoint aside if that was decided, the disk has it, and another."""
        why, self._why_older = self._why_older, ""
        if not why:
            return
        with contextlib.suppress(OSError):  # what cannot be set aside is tried once more
            found = bypassed_and_older(self._job)
            if found is None or not self._memory.forget(checkpoint_key(found[0].name)):
                return
            newest, older = found
            target = bypass(self._job, newest, why)
            self._journal.write("quarantined", path=str(newest), to=str(target), reason=why)
            account.say(f"{why}: setting {newest.name} aside, going on from {older.name}")
