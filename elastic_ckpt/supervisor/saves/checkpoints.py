"""Where the checkpoints of a job are, for the thread that looks after the job directory: in the
directory itself, or in the bucket of nodes that share none."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.ownership import BucketClaim, identity_of, read_owner
from elastic_ckpt.checkpoint.bucket.retain import set_aside, sweep
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.bucket.take import newest_owner
from elastic_ckpt.checkpoint.catalog import (
    CheckpointView,
    fall_back,
    newest_of_job,
    newest_two_intact,
)
from elastic_ckpt.checkpoint.cleanup import recover
from elastic_ckpt.checkpoint.manifest import Manifest
from elastic_ckpt.checkpoint.ownership.fence import read_run, run_numbers
from elastic_ckpt.checkpoint.ownership.job_lock import RunLocks
from elastic_ckpt.checkpoint.ownership.leaders import leader_in, leader_of
from elastic_ckpt.checkpoint.remote_note import forget_remote, note_remote
from elastic_ckpt.errors import BucketFailed, CheckpointError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.events import AttemptRecovered, Quarantined
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.lease import BUCKET_HEAD_BEAT_SECONDS
from elastic_ckpt.protocol.succession import Leader
from elastic_ckpt.supervisor.ports import NO_CHECKPOINT, Key
from elastic_ckpt.util.progress import in_lines

_OWNERS: Final = 5
"""Newest owners of a bucket whose names a node that joins looks at."""


class JobCheckpoints(Protocol):
    """The checkpoints of a job. One thread calls the methods; each may wait for the storage, and
    raises OSError if it does not answer."""

    def newest(self) -> Key:
        """Return the newest intact one of all sessions."""

    def check(self) -> None:
        """Raise RunSuperseded if another run owns the job."""

    def beat(self) -> None:
        """Show that this run lives, where the directory's own beat does not; raises as
        :meth:`check`."""

    def clean_up(self, hurry: Callable[[], bool], spare: str) -> None:
        """Seal or remove what a killed run left; from another thread, before workers run."""

    def fall_back(self, why: str, may_act: Callable[[Key], bool], session: str) -> str:
        """Set a session's newest one aside if it has an older one and ``may_act`` agrees; return
        what was done in one line, or nothing."""

    def identity(self) -> str:
        """Return what tells this run of this job from others; empty if that is not known."""

    def known_identities(self) -> tuple[str, ...]:
        """Return those of the job's runs, the newest first."""

    def leader(self) -> Leader | None:
        """Return the newest run of the job; None before the first."""

    def end(self, *, passed_on: bool = False) -> None:
        """Let the next run take over at once, where the directory's locks do not; the last call."""


class DirectoryCheckpoints:
    """In the job directory."""

    def __init__(
        self, job: JobDirectory, locks: RunLocks, journal: Journal, say: Callable[[str], None]
    ) -> None:
        self._job = job
        self._locks = locks
        self._journal = journal
        self._say = say

    def newest(self) -> Key:
        newest = newest_of_job(self._job)
        return newest.age if newest else NO_CHECKPOINT

    def check(self) -> None:
        if self._locks.ownership is not None:
            self._locks.ownership.check()

    def beat(self) -> None:
        """Do nothing: the owner of the directory beats."""

    def clean_up(self, hurry: Callable[[], bool], spare: str) -> None:
        for path, what in recover(
            self._job, hurry, in_lines(self._say), spare, self._locks.ownership
        ):
            self._journal.write(AttemptRecovered(path=str(path), what=what))

    def fall_back(self, why: str, may_act: Callable[[Key], bool], session: str) -> str:
        job = self._job.session(session)
        found = newest_two_intact(job) if job in self._job.sessions() else None
        self.check()
        if found is None or self._is_of_a_later_run(found[0]) or not may_act(found[0].age):
            return ""
        newest, older = found
        target = fall_back(job, newest.path, why)
        self._journal.write(Quarantined(path=str(newest.path), to=str(target), reason=why))
        return f"{why}: setting {newest.shown} aside, resuming from {older.shown}"

    def _is_of_a_later_run(self, one: CheckpointView) -> bool:
        owned = self._locks.ownership
        return owned is not None and one.manifest is not None and one.manifest.run > owned.number

    def identity(self) -> str:
        owned = self._locks.ownership
        # The owner has read it at its start; its disk may be away by now.
        return f"{owned.identity}.{owned.nonce}" if owned else f"{self._job.identity()}."

    def known_identities(self) -> tuple[str, ...]:
        with contextlib.suppress(OSError):
            job, numbers = self._job.known_identity(), run_numbers(self._job)
            runs = [read_run(self._job, number) for number in sorted(numbers, reverse=True)]
            return tuple(f"{job}.{run.nonce if run else ''}" for run in runs)
        return ()

    def leader(self) -> Leader | None:
        return leader_of(self._job)

    def end(self, *, passed_on: bool = False) -> None:
        """Do nothing: the owner of the directory ends its run."""


class BucketCheckpoints:
    """In the bucket of several nodes. ``claim`` is the head's; the others only look."""

    def __init__(
        self, job: JobDirectory, store: Bucket, claim: BucketClaim | None, journal: Journal
    ) -> None:
        self._job = job
        self.store = store
        self._claim = claim
        self._journal = journal
        self.owner = claim.number if claim else 0
        """Number of the newest claim that this node knows of; 0 for none."""
        self._next_beat = 0.0
        self._is_swept = False
        self._identity = ""
        self._known: dict[SealKey, Manifest] = {}  # the newest of each session
        self._noted: tuple[SealKey, Manifest] | None = None

    def newest(self) -> Key:
        told = self._told()
        seals = [
            catalog.newest(self.store, one, told) for one in catalog.sessions(self.store, told)
        ]
        found = [self._read(seal) for seal in seals if seal is not None]
        self._known = {one[0]: one[1] for one in found if one is not None}
        newest = max(self._known.items(), key=lambda one: one[1].age, default=None)
        if newest != self._noted:
            self._note(newest)
        return newest[1].age if newest else NO_CHECKPOINT

    def _note(self, newest: tuple[SealKey, Manifest] | None) -> None:
        if newest is None:
            forget_remote(self._job)
        else:
            note_remote(self._job, self.store.url, newest[1])
        self._noted = newest

    def check(self) -> None:
        if self._claim is not None:
            self._claim.check()

    def beat(self) -> None:
        now = time.monotonic()
        if self._claim is not None and now >= self._next_beat:
            self._next_beat = now + BUCKET_HEAD_BEAT_SECONDS
            self._claim.beat()

    def clean_up(self, hurry: Callable[[], bool], spare: str) -> None:
        """Remove what was uploaded long ago and never sealed; once a run."""
        del hurry, spare
        if self._claim is not None and not self._is_swept:
            self._is_swept = True
            for session in catalog.sessions(self.store):
                with contextlib.suppress(BucketFailed):
                    sweep(self._claim, session)

    def fall_back(self, why: str, may_act: Callable[[Key], bool], session: str) -> str:
        intact = self._intact(session)
        newest, older = next(intact, None), next(intact, None)
        self.check()
        if newest is None or older is None or self._claim is None:
            return ""
        if not may_act(newest[1].age):
            return ""
        to = set_aside(self._claim, newest[0])
        self._journal.write(Quarantined(path=newest[0].key, to=to, reason=why))
        return f"{why}: setting {newest[0].name} aside, resuming from {older[0].name}"

    def identity(self) -> str:
        if not self._identity:  # it stays what it is, and the loop must not wait for it again
            self._identity = identity_of(self.store)
        return f"{self._identity}.{self._claim.owner.nonce if self._claim else ''}"

    def known_identities(self) -> tuple[str, ...]:
        job = identity_of(self.store)
        self.owner = number = newest_owner(self.store)
        owners = [
            read_owner(self.store, one) for one in range(number, max(0, number - _OWNERS), -1)
        ]
        return tuple(f"{job}.{owner.nonce}" for owner in owners if owner is not None)

    def leader(self) -> Leader | None:
        return leader_in(self.store)

    def end(self, *, passed_on: bool = False) -> None:
        if self._claim is not None:
            self._claim.beat(ended=True, passed_on=passed_on)

    def _told(self) -> dict[str, str] | None:
        """Return what the leader of the ranks has sealed; None on a node that only looks."""
        return self._claim.learn() if self._claim is not None else None

    def _read(self, seal: SealKey) -> tuple[SealKey, Manifest] | None:
        """Return the newest intact one from this seal on."""
        if seal in self._known:
            return seal, self._known[seal]
        with contextlib.suppress(CheckpointError):
            return seal, catalog.read_intact(self.store, seal)
        return next(self._intact(seal.session), None)

    def _intact(self, session: str) -> Iterator[tuple[SealKey, Manifest]]:
        for one in catalog.current(self.store, session, self._told()):
            with contextlib.suppress(CheckpointError):
                yield one.seal, catalog.read_intact(self.store, one.seal)
