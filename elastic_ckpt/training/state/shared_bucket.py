"""The bucket of a job whose nodes share no directory, as a rank sees it."""

from __future__ import annotations

import os

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.ownership import BucketClaim, claim_lock, claim_of, lock_at
from elastic_ckpt.checkpoint.bucket.ranks.reading import LocalRank
from elastic_ckpt.checkpoint.bucket.tier import BucketTier
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.errors import CheckpointError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.protocol.worker_spec import SharedBucket


class RankBucket:
    """Opens the store once, and claims what the run has claimed once the leader needs it."""

    def __init__(self, shared: SharedBucket, job: JobDirectory) -> None:
        self.url = shared.url
        self.claim = shared.claim
        self._lock = lock_at(claim_lock(job))
        self._shared = shared
        self._local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._store = open_store(BucketUrl.parse(shared.url), sharers=self._local)
        self._claim: BucketClaim | None = None

    def tier(self, job: JobDirectory) -> BucketTier:
        """Return the tier of a session, on any rank; makes no request."""
        local = self._local
        nodes = -(-int(os.environ.get("WORLD_SIZE", "1")) // local)
        rank = LocalRank(int(os.environ.get("LOCAL_RANK", "0")), local, nodes)
        return BucketTier(self._store, job, self._claimed, rank)

    def session_order(self, name: str) -> int:
        """Return the ``session_order`` of a session that is opened now; leader only.

        Raises:
            BucketFailed: the store does not answer.
        """
        own, others = 0, -1
        told = self._claimed().newest
        for session in catalog.sessions(self._store, told):
            newest = catalog.newest(self._store, session, told)
            try:
                order = catalog.read_seal(self._store, newest).session_order if newest else -1
            except CheckpointError:
                continue  # the load finds out
            if session == name:
                own = order
            else:
                others = max(others, order)
        return max(own, others + 1)

    def _claimed(self) -> BucketClaim:
        """Raises RunSuperseded if another run owns the bucket, BucketFailed without an answer."""
        if self._claim is None:
            shared = self._shared
            self._claim = claim_of(self._store, shared.claim, shared.nonce, self._lock)
        return self._claim
