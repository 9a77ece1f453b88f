"""One attempt at one checkpoint on disk, from an empty directory to the seal.

::

    .attempts/120-3f9c.../        every rank writes its files, then its part manifest, last
    .attempts/120-3f9c.../manifest.json           the seal, written once all parts are known
    epoch-0_step-120/                             one rename: now it is a checkpoint

A kill between any two system calls leaves an attempt, which is never loaded, or a checkpoint.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.checkpoint.manifest import (
    FileEntry,
    SealHeader,
    decode_manifest,
    encode,
    make_manifest,
)
from elastic_ckpt.checkpoint.quarantine import set_aside
from elastic_ckpt.checkpoint.tier import Ref
from elastic_ckpt.checkpoint.verify import MANIFEST_NAME, read_manifest, verify_full
from elastic_ckpt.errors import CheckpointError, CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.files import (
    create_directory,
    remove_tree,
    sync_directory,
    sync_tree,
    write_atomic,
)

NAME: Final = "disk"


@dataclass(frozen=True)
class DiskAttempt:
    """A directory that one attempt writes to; see :class:`elastic_ckpt.checkpoint.tier.Attempt`."""

    job: JobDirectory
    identity: str
    step: int

    @classmethod
    def begin(cls, job: JobDirectory, step: int, identity: str | None = None) -> DiskAttempt:
        """Make a new directory, for a drain in place of what an earlier drain of ``identity`` left.
        DirectoryUnusable if a link stands where attempts belong, OSError if the storage failed."""
        attempt = cls(job, identity or secrets.token_hex(8), step)
        job.require(job.attempts)
        if identity is not None:
            attempt.drop()
        try:
            create_directory(attempt.path)
            create_directory(attempt.path / "parts")
            create_directory(attempt.path / "ranks")
        except OSError:
            attempt.drop()
            raise
        return attempt

    @property
    def path(self) -> Path:
        return self.job.attempts / f"{self.step}-{self.identity}"

    def part(self, rank: int) -> DiskPart:
        return DiskPart(self.path, self.identity, rank)

    @property
    def ref(self) -> Ref:
        return Ref(NAME, str(self.step), self.identity)

    def seal(self, header: SealHeader, files: Sequence[FileEntry], _: Retention) -> Ref:
        return Ref(NAME, self.publish(header, files).name)

    def publish(self, header: SealHeader, files: Sequence[FileEntry]) -> Path:
        """Turn the attempt into a checkpoint. Leader only, after every part is durable.

        Args:
            files: all parts' files, as their writers described them.

        Returns:
            The checkpoint's directory. If an intact checkpoint stands there already it is kept
            and the attempt dropped; an invalid one is set aside.

        Raises:
            CheckpointRejected: no checkpoint can hold that: too many files, one listed twice.
            OSError: the storage failed; the attempt is not a checkpoint, or not yet a durable one.
        """
        data = encode(make_manifest(header, files))
        decode_manifest(data)  # do not seal what cannot be read
        if os.path.lexists(self.path):  # else it was renamed already
            sync_tree(self.path)
            write_atomic(self.path / MANIFEST_NAME, data)
        return self._rename(self.job.checkpoint(header.epoch, header.step))

    def _rename(self, target: Path) -> Path:
        for _ in range(3):
            try:
                os.rename(self.path, target)
            except FileNotFoundError:
                # The rename was done already: by another node, or by an earlier request of ours
                # whose answer a network file system lost.
                if not self._is_ours(target):
                    raise
                sync_directory(target.parent)
                return target
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                if self._yields_to(target):
                    # The one that put it there may have been killed before it made it durable.
                    sync_directory(target.parent)
                    self.drop()
                    return target
            else:
                sync_directory(target.parent)
                sync_directory(self.job.attempts)
                return target
        raise OSError(errno.EEXIST, "another writer keeps taking the checkpoint's place", target)

    def _yields_to(self, target: Path) -> bool:
        """Return whether the checkpoint in our place is as good as ours."""
        try:
            if not stat.S_ISDIR(os.lstat(target).st_mode):
                # No restart would take a link or a file for a checkpoint.
                raise CheckpointRejected("it is not a directory")
            if read_manifest(target).attempt == self.identity:
                return True
            verify_full(target)
        except FileNotFoundError:
            return False  # it has just gone away
        except CheckpointError as error:
            set_aside(self.job, target, str(error))
            return False
        return True

    def _is_ours(self, target: Path) -> bool:
        try:
            return read_manifest(target).attempt == self.identity
        except CheckpointError:
            return False

    def drop(self) -> None:
        """Remove the attempt, whatever is in it; what cannot be removed waits for a recovery."""
        if self.job.owns(self.job.attempts):
            remove_tree(self.path)
