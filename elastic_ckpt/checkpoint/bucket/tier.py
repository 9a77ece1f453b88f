"""The checkpoints in a bucket, as a tier of ranks on several machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.attempt import NAME, BucketAttempt, tidy
from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.ownership import BucketClaim
from elastic_ckpt.checkpoint.bucket.ranks.reading import BucketReading, LocalRank
from elastic_ckpt.checkpoint.bucket.retain import set_aside
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.disk.space import ensure_space
from elastic_ckpt.checkpoint.manifest import SealHeader
from elastic_ckpt.checkpoint.tier import Ref, Stored
from elastic_ckpt.errors import CheckpointError, CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory


class BucketTier:
    """See :class:`elastic_ckpt.checkpoint.tier.Tier`.

    Args:
        job: this machine's directory, with the files of the last attempts.
        claim: returns that of the run, to the leader of the ranks: no other rank asks.
        local: None for a process that verifies the share of a rank of the whole job.
        keeps_files: what is saved stays on this machine as well, for the next load; else it is
            uploaded as it is written.
    """

    name = NAME
    every_byte = True

    def __init__(
        self,
        store: Bucket,
        job: JobDirectory,
        claim: Callable[[], BucketClaim],
        local: LocalRank | None = None,
        *,
        keeps_files: bool = True,
    ) -> None:
        self._store = store
        self._job = job
        self._claim = claim
        self._local = local
        self._keeps_files = keeps_files

    def begin(self, step: int, size: int, identity: str | None = None) -> BucketAttempt:
        if not self._keeps_files:
            return BucketAttempt.begin(self._job, self._claim(), step, identity, keeps_files=False)
        ensure_space(self._job.home, size // (self._local.nodes if self._local else 1), _nothing)
        attempt = BucketAttempt.begin(self._job, self._claim(), step, identity)
        tidy(self._job, attempt.path)
        return attempt

    def join(self, ref: Ref) -> BucketAttempt:
        attempt = BucketAttempt.join(self._store, self._job, ref, keeps_files=self._keeps_files)
        if self._local is not None and self._local.rank == 0:
            tidy(self._job, attempt.path)
        return attempt

    def newest(self) -> Stored | None:
        return next((one for one in self._stored() if one.why is None), None)

    def candidates(self, world_size: int) -> list[Stored]:
        """Return them down to the first intact one: they can be resharded."""
        found: list[Stored] = []
        for one in self._stored():
            found.append(one)
            if one.why is None:
                break
        return found

    def holds(self, seal: SealHeader) -> bool:
        with suppress(CheckpointError, OSError):
            return any(one.seal.attempt == seal.attempt for one in self._current(seal.session))
        return False

    def open(self, ref: Ref) -> BucketReading:
        return BucketReading(self._store, self._job, self._key(ref), ref, self._local)

    def where(self, ref: Ref) -> str:
        return f"{self._store.url}/{ref.name}"

    def reject(self, ref: Ref, why: str) -> str:
        """Take its seal away: its files stay until they are swept."""
        del why  # the journal has it
        return set_aside(self._claim(), self._key(ref))

    def has_gone_past(self, run: int) -> bool:
        """Return whether the job has a checkpoint of a later claim than ``run``; leader only."""
        newest = next(iter(self._current(self._job.name)), None)
        return newest is not None and newest.seal.claim > run

    def leave_newer(self, key: tuple[int, int]) -> list[str]:
        """Set aside what is newer than (epoch, step), before the first save of another branch;
        return where it went. Leader only; BucketFailed if the store failed."""
        found = [one.seal for one in self._current(self._job.name)]
        newer = [seal for seal in found if (seal.epoch, seal.step) > key]
        return [self.reject(self._ref(seal), "") for seal in newer]

    def _stored(self) -> Iterator[Stored]:
        for one in self._current(self._job.name):
            place = (one.seal.epoch, one.seal.step)
            try:
                manifest = catalog.read_intact(self._store, one.seal)
            except CheckpointRejected as error:
                yield Stored(self._ref(one.seal), place, None, error)
            else:
                yield Stored(self._ref(one.seal), place, manifest)

    def _current(self, session: str) -> Iterator[catalog.Listed]:
        return catalog.current(self._store, session, self._claim().newest)

    def named(self, name: str) -> Ref:
        """Return the checkpoint that people call so; leader only. CheckpointRejected without it."""
        for one in self._current(self._job.name):
            if one.seal.name == name:
                return self._ref(one.seal)
        raise CheckpointRejected(f"{name[:200]} is not in {self._store.url}")

    @staticmethod
    def _ref(seal: SealKey) -> Ref:
        return Ref(NAME, seal.key, seal.attempt)

    def _key(self, ref: Ref) -> SealKey:
        seal = SealKey.parse(self._job.name, ref.name)
        if seal is None or seal.key != ref.name or ref.attempt not in ("", seal.attempt):
            raise CheckpointRejected(f"{ref.name[:200]!r} is no seal")
        return seal


def _nothing() -> None:
    """Make no room: the newest attempts alone are here."""
