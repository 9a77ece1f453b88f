"""One attempt at one checkpoint in a bucket, from several machines.

Each rank writes its files into a directory of its own machine, hashed on the way, and uploads them
once it has all. The leader creates the seal when every file is there. A kill at any moment leaves
objects that no seal names, which a later owner sweeps. The local files stay for the next load.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.ownership import BucketClaim
from elastic_ckpt.checkpoint.bucket.ranks.uploaded_part import UploadedPart
from elastic_ckpt.checkpoint.bucket.retain import prune
from elastic_ckpt.checkpoint.bucket.source import in_directory
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.bucket.transfer import seal_uploaded, send
from elastic_ckpt.checkpoint.disk.hashed_file import HashedFile, digest_file
from elastic_ckpt.checkpoint.disk.side_by_side import side_by_side
from elastic_ckpt.checkpoint.manifest import FileEntry, SealHeader, check_path, make_manifest
from elastic_ckpt.checkpoint.part_files import PartFiles
from elastic_ckpt.checkpoint.tier import Ref
from elastic_ckpt.errors import BucketFailed, BucketRefused, CheckpointRejected, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.files import open_regular, remove_tree

NAME: Final = "bucket"

_KEPT: Final = 2
"""Attempts whose files stay on this machine, the newest: the last checkpoint, and the next one."""


class _UploadedFile(HashedFile):
    """Its contents are durable once they are in the bucket."""

    def sync(self) -> None:
        """Do nothing."""


class BucketPart(PartFiles):
    """A part: written into a directory of this machine, then uploaded by :meth:`finish`."""

    def __init__(self, store: Bucket, directory: Path, prefix: str, rank: int) -> None:
        super().__init__(directory, rank)
        self._store = store
        self._prefix = prefix

    def _create(self, path: str, size: int | None, paged: bool) -> HashedFile:
        del size, paged
        target = self._directory / path
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _UploadedFile(target)

    def claim(self, path: str) -> None:
        check_path(path)
        target = self._directory / path
        with open(open_regular(target), "rb") as file:
            if os.fstat(file.fileno()).st_nlink != 1:
                raise CheckpointRejected(f"{path} has another name: hard links are not followed")
        self._entries[path] = digest_file(target).entry(path, self.rank)

    def finish(self, world_size: int, header: SealHeader | None) -> list[FileEntry]:
        """Upload the files, and return them."""
        files = list(self._entries.values())
        total = sum(entry.bytes for entry in files)
        source = in_directory(self._directory)
        side_by_side(partial(send, self._store, self._prefix, source), files, total)
        return files


class BucketAttempt:
    """See :class:`elastic_ckpt.checkpoint.tier.Attempt`. ``claim`` is the leader's; the other
    ranks have the number of it alone. ``keeps_files``: its files stay on this machine."""

    def __init__(
        self,
        store: Bucket,
        job: JobDirectory,
        number: int,
        step: int,
        identity: str,
        claim: BucketClaim | None = None,
        *,
        keeps_files: bool = True,
    ) -> None:
        self._store = store
        self._job = job
        self._claim = claim
        self._seal = SealKey(job.name, number, 0, step, identity)
        self._is_sealed = False
        self._keeps_files = keeps_files
        self.path = local_files(job, self._seal)

    @classmethod
    def begin(
        cls,
        job: JobDirectory,
        claim: BucketClaim,
        step: int,
        identity: str | None,
        *,
        keeps_files: bool = True,
    ) -> BucketAttempt:
        """Make a directory for its files. RunSuperseded if another run owns the bucket by now,
        BucketFailed if it does not answer."""
        claim.check()
        name = identity or secrets.token_hex(8)
        made = cls(claim.store, job, claim.number, step, name, claim, keeps_files=keeps_files)
        if keeps_files:
            remove_tree(made.path)
            made.prepare()
        return made

    @classmethod
    def join(
        cls, store: Bucket, job: JobDirectory, ref: Ref, *, keeps_files: bool = True
    ) -> BucketAttempt:
        """Return the attempt that the leader began."""
        number, step = map(int, ref.name.split("."))
        made = cls(store, job, number, step, ref.attempt, keeps_files=keeps_files)
        if keeps_files:
            made.prepare()
        return made

    @property
    def ref(self) -> Ref:
        return Ref(NAME, f"{self._seal.claim}.{self._seal.step}", self._seal.attempt)

    def prepare(self) -> None:
        """Make the directory; any number of this machine's ranks may."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def part(self, rank: int) -> BucketPart | UploadedPart:
        if not self._keeps_files:
            return UploadedPart(self._store, self._seal.data, rank)
        return BucketPart(self._store, self.path, self._seal.data, rank)

    def seal(self, header: SealHeader, files: Sequence[FileEntry], retention: Retention) -> Ref:
        """Seal it, and delete what no rule keeps unless a notice waits for this."""
        if self._claim is None:
            raise UsageError("only the leader of the ranks seals a checkpoint")
        found = seal_uploaded(self._claim, make_manifest(header, files))
        self._is_sealed = True
        if header.reason != "emergency":
            with suppress(BucketFailed, BucketRefused):  # it is sealed; the next save tries again
                prune(self._claim, header.session, retention)
        return Ref(NAME, found.key, found.attempt)

    def drop(self) -> None:
        """Remove the local files; what was uploaded is swept later, as no seal names it."""
        if self._keeps_files and not self._is_sealed:
            remove_tree(self.path)


def local_files(job: JobDirectory, seal: SealKey) -> Path:
    """Return where this machine keeps files of an attempt."""
    return _home(job) / f"{seal.claim}.{seal.step}-{seal.attempt}"


def _home(job: JobDirectory) -> Path:
    return job.control / "bucket" / (job.name or "-")


def tidy(job: JobDirectory, keep: Path) -> None:
    """Remove the local files of older attempts, but for those that a load has open."""
    with suppress(OSError):
        found = [one for one in job.found(_home(job), "*") if one != keep]
        found.sort(key=lambda one: one.lstat().st_mtime_ns)
        for one in found[: max(0, len(found) + 1 - _KEPT)]:
            fd = os.open(one, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(one)
            except BlockingIOError:
                continue  # it is being loaded
            finally:
                os.close(fd)
