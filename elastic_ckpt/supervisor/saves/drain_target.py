"""Where a drain brings what is in memory: to the job's directory, or to the bucket of nodes that
share none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from elastic_ckpt.checkpoint.bucket.ownership import BucketClaim
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.bucket.tier import BucketTier
from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.manifest import SealHeader
from elastic_ckpt.checkpoint.memory.seal import MemorySeal
from elastic_ckpt.checkpoint.ownership.fence import Fence
from elastic_ckpt.checkpoint.prune import Retainer
from elastic_ckpt.checkpoint.tier import Tier
from elastic_ckpt.errors import RunSuperseded
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import Journal


class DrainTarget(Protocol):
    """The place of one run. A drain's thread calls ``tier`` and ``has``, the loop the rest."""

    name: str
    """For people, as in "bringing step 5 to the disk"."""

    seals: bool
    """Whether this run owns the place; else it only writes its part of what another one seals."""

    def part_of(self, session: str) -> Tier:
        """Return the tier of a session, to join an attempt there that another node seals."""

    def tier(self, seal: MemorySeal) -> Tier:
        """Return the tier of the session that a seal is of."""

    def is_ours(self, seal: MemorySeal) -> bool:
        """Return whether a generation is to be brought there, for all that its seal says."""

    def has(self, seal: MemorySeal) -> bool:
        """Return whether it is there, after a drain that did not fail; else another run has gone
        past it. Raises OSError if the place is away."""

    def begin(self, seal: MemorySeal) -> None:
        """Prepare for a drain of this one."""

    def drained(self, seal: MemorySeal) -> str:
        """Delete what no rule keeps now; return where the checkpoint is, for people."""

    def finish_pruning(self, hurry: Callable[[], bool]) -> None:
        """Wait for the deletion of old checkpoints until ``hurry`` returns True."""


class DirectoryTarget:
    """The job's directory. ``fence`` is of the run, which seals; None to seal without."""

    name = "the disk"

    def __init__(
        self, job: JobDirectory, fence: Fence | None, journal: Journal, say: Callable[[str], None]
    ) -> None:
        self._job = job
        self._fence = fence
        self._journal = journal
        self._say = say
        self._retainers: dict[str, Retainer] = {}
        self._run = fence.number if fence is not None else 0
        self.seals = fence is not None

    def part_of(self, session: str) -> DiskTier:
        return DiskTier(self._job.session(session))

    def tier(self, seal: MemorySeal) -> DiskTier:
        place = self._job.session(seal.session)
        make_room = self._retainer(seal).make_room
        return DiskTier(place, make_room, self._fence, one_host=seal.share is None)

    def is_ours(self, seal: MemorySeal) -> bool:
        """A complete one of an earlier run is ours as well."""
        return seal.is_whole or seal.run == self._run

    def has(self, seal: MemorySeal) -> bool:
        if self.tier(seal).holds(seal):
            return True
        if self._fence is not None:
            self._fence.check_place()  # the disk may have gone just now
        return False

    def begin(self, seal: MemorySeal) -> None:
        self._retainer(seal).rule = seal.retention

    def drained(self, seal: MemorySeal) -> str:
        self._retainer(seal).after_save()
        job = self._job.session(seal.session)
        return str(job.checkpoint(seal.epoch, seal.step))

    def finish_pruning(self, hurry: Callable[[], bool]) -> None:
        for retainer in self._retainers.values():
            retainer.finish(hurry)

    def _retainer(self, seal: SealHeader) -> Retainer:
        """Return what deletes a session's old checkpoints."""
        job = self._job.session(seal.session)
        return self._retainers.setdefault(job.name, Retainer(job, self._journal, self._say))


class BucketTarget:
    """The bucket of several nodes; each uploads its own ranks' files from its memory.

    Args:
        claim: the run's, of a drain's thread alone; None on a node that does not seal.
    """

    name = "the bucket"

    def __init__(self, job: JobDirectory, store: Bucket, claim: BucketClaim | None) -> None:
        self._job = job
        self._store = store
        self._claim = claim
        self.seals = claim is not None

    def part_of(self, session: str) -> BucketTier:
        place = self._job.session(session)
        return BucketTier(self._store, place, self._claimed, keeps_files=False)

    def tier(self, seal: MemorySeal) -> BucketTier:
        return self.part_of(seal.session)

    def is_ours(self, seal: MemorySeal) -> bool:
        """What an earlier run left may be off the job's line: the ranks find that out."""
        return self._claim is not None and seal.run == self._claim.number

    def has(self, seal: MemorySeal) -> bool:
        """The seal was made, and it is the claim that says so."""
        del seal
        return True

    def begin(self, seal: MemorySeal) -> None:
        """Do nothing: room has no limit here."""

    def drained(self, seal: MemorySeal) -> str:
        """The seal itself has deleted what no rule keeps."""
        return f"{self._store.url}/{seal.checkpoint_name}"

    def finish_pruning(self, hurry: Callable[[], bool]) -> None:
        """Do nothing: each drain waits for it."""

    def _claimed(self) -> BucketClaim:
        if self._claim is None:
            raise RunSuperseded(f"another node owns {self._store.url}")
        return self._claim
