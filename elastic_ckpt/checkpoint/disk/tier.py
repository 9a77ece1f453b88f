"""The disk tier: the checkpoints in a job directory, as a tier."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from elastic_ckpt.checkpoint.catalog import candidates, newest_intact
from elastic_ckpt.checkpoint.disk.attempt import NAME, DiskAttempt
from elastic_ckpt.checkpoint.disk.space import ensure_space
from elastic_ckpt.checkpoint.manifest import SealHeader
from elastic_ckpt.checkpoint.ownership.fence import Fence
from elastic_ckpt.checkpoint.ownership.read_lock import BeingRemoved, ReadLock
from elastic_ckpt.checkpoint.quarantine import set_aside
from elastic_ckpt.checkpoint.tier import Ref, Stored
from elastic_ckpt.checkpoint.verify import (
    MANIFEST_NAME,
    Unchanged,
    mark_verified,
    read_manifest,
    share_out,
    verify_files,
    verify_quick,
)
from elastic_ckpt.errors import CheckpointError, CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key
from elastic_ckpt.util.progress import Watch


class DiskTier:
    """See :class:`elastic_ckpt.checkpoint.tier.Tier`. ``make_room`` deletes what no retention rule
    keeps, for a save that does not fit; ``fence`` is of the run that saves, None to read only.
    ``one_host`` as in :class:`DiskAttempt`."""

    name = NAME
    every_byte = True

    def __init__(
        self,
        job: JobDirectory,
        make_room: Callable[[], None] = lambda: None,
        fence: Fence | None = None,
        *,
        one_host: bool = False,
    ) -> None:
        self._job = job
        self._fence = fence
        self._one_host = one_host
        self._make_room = make_room

    def begin(self, step: int, size: int, identity: str | None = None) -> DiskAttempt:
        ensure_space(self._job.home, size, self._make_room)
        return DiskAttempt.begin(self._job, step, identity, self._fence, one_host=self._one_host)

    def join(self, ref: Ref) -> DiskAttempt:
        return DiskAttempt.join(self._job, ref, self._fence, one_host=self._one_host)

    def newest(self) -> Stored | None:
        found = newest_intact(self._job)
        if found is None or found.manifest is None:
            return None
        ref = Ref(NAME, found.path.name, found.manifest.attempt)
        return Stored(ref, (found.epoch, found.step), found.manifest)

    def candidates(self, world_size: int) -> list[Stored]:
        """Return all of them: a checkpoint on disk can be resharded."""
        return [
            Stored(Ref(NAME, path.name), checkpoint_key(path.name) or (0, 0), manifest, why)
            for path, manifest, why in candidates(self._job)
        ]

    def holds(self, seal: SealHeader) -> bool:
        try:
            return verify_quick(self._job.checkpoint(seal.epoch, seal.step)).attempt == seal.attempt
        except (CheckpointError, OSError):
            return False

    def open(self, ref: Ref) -> DiskReading:
        return DiskReading(self._job, self._job.root / ref.name, ref)

    def where(self, ref: Ref) -> str:
        return str(self._job.root / ref.name)

    def reject(self, ref: Ref, why: str) -> str:
        """Move it to quarantine."""
        path = self._job.root / ref.name
        return str(set_aside(self._job, path, why)) if os.path.lexists(path) else ""


class DiskReading:
    """See :class:`elastic_ckpt.checkpoint.tier.Reading`."""

    rest = None

    def __init__(self, job: JobDirectory, path: Path, ref: Ref) -> None:
        """Lock the checkpoint against deletion; raises as the protocol's ``open``."""
        self._job = job
        self.path = path
        self.seal = read_manifest(path)  # reports a bad manifest, where the lock finds it missing
        if ref.attempt not in ("", self.seal.attempt):
            raise CheckpointRejected("another attempt has taken its place")
        self.ref = ref
        self._lock = _lock(path)
        self._unchanged: Unchanged | None = None

    def verify(self, rank: int, world_size: int, watch: Watch) -> None:
        try:
            # On every rank, as a rank hashes only listed files: this finds links and unlisted ones.
            self.seal = verify_quick(self.path)
            mine = share_out(self.seal.files, rank, world_size)
            self._unchanged = Unchanged(self.path, mine)
            total = sum(entry.bytes for entry in mine)
            verify_files(self.path, mine, watch(f"verifying {self.path.name}", total))
        except FileNotFoundError as error:
            raise CheckpointRejected(f"{error.filename} is missing") from None

    def confirm(self) -> None:
        if self._unchanged is None:
            raise CheckpointRejected("it was not verified")
        self._unchanged.check()

    def mark_verified(self) -> None:
        mark_verified(self._job, self.path, self.seal)

    def close(self) -> None:
        self._lock.release()


def _lock(path: Path) -> ReadLock:
    """Lock a checkpoint against deletion. OSError if another process keeps it locked, which any
    reader can do: it may be good, so it must not be set aside."""
    try:
        return ReadLock(path)
    except BeingRemoved:
        if not os.path.lexists(path / MANIFEST_NAME):
            raise
    why = "another process keeps it locked"
    raise OSError(errno.EBUSY, why, str(path / MANIFEST_NAME))
