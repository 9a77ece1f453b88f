"""One attempt at one checkpoint on disk, from an empty directory to the seal.

::

    .attempts/7.120-3f9c.../                every rank writes its files, then its part manifest
    .attempts/7.120-3f9c.../manifest.json   the seal, written once all parts are known
    epoch-0_step-120/                       one rename: now it is a checkpoint

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

from elastic_ckpt.checkpoint.disk.part import DiskPart, directories_of
from elastic_ckpt.checkpoint.lineage import (
    has_same_state,
    is_later,
    is_stale,
    replace_by,
    straighten,
    supersede,
)
from elastic_ckpt.checkpoint.manifest import (
    FileEntry,
    Manifest,
    SealHeader,
    decode_manifest,
    encode,
    make_manifest,
)
from elastic_ckpt.checkpoint.ownership.fence import Fence
from elastic_ckpt.checkpoint.quarantine import set_aside
from elastic_ckpt.checkpoint.tier import Ref
from elastic_ckpt.checkpoint.verify import MANIFEST_NAME, read_manifest, verify_full
from elastic_ckpt.errors import CheckpointError, CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.files import (
    create_directory,
    group_may_read,
    remove_tree,
    sync_directory,
    write_atomic,
)

NAME: Final = "disk"


@dataclass(frozen=True)
class DiskAttempt:
    """A directory that one attempt writes to; see :class:`elastic_ckpt.checkpoint.tier.Attempt`.

    Attributes:
        one_host: whether all ranks are on the leader's host: then the leader alone syncs the
            directories, as an fsync there covers what any process of its kernel created.
        shared: whether the group may read it; None for not known.
    """

    job: JobDirectory
    identity: str
    step: int
    run: int = 0
    fence: Fence | None = None
    one_host: bool = False
    shared: bool | None = None

    @classmethod
    def begin(
        cls,
        job: JobDirectory,
        step: int,
        identity: str | None = None,
        fence: Fence | None = None,
        *,
        one_host: bool = False,
    ) -> DiskAttempt:
        """Make a new directory, for a drain in place of what an earlier drain of ``identity`` left.
        DirectoryUnusable if a link stands where attempts belong, RunSuperseded if another run owns
        the job by now, OSError if the storage failed."""
        if fence is not None:
            fence.check()
        run = fence.number if fence is not None else 0
        job.require(job.attempts)
        shared = group_may_read(job.attempts)
        name = identity or secrets.token_hex(8)
        attempt = cls(job, name, step, run, fence, one_host, shared)
        if identity is not None:
            attempt.drop()
        try:
            for place in (attempt.path, attempt.path / "parts", attempt.path / "ranks"):
                create_directory(place, shared=shared)
        except OSError:
            attempt.drop()
            raise
        return attempt

    @property
    def path(self) -> Path:
        run = f"{self.run}." if self.run else ""
        return self.job.attempts / f"{run}{self.step}-{self.identity}"

    def part(self, rank: int) -> DiskPart:
        made = DiskPart(
            self.path, self.identity, rank, shared=self.shared, leaves_names=self.one_host
        )
        made.expect("parts", "ranks")
        return made

    @property
    def ref(self) -> Ref:
        return Ref(NAME, f"{self.run}.{self.step}", self.identity)

    @classmethod
    def join(
        cls, job: JobDirectory, ref: Ref, fence: Fence | None = None, *, one_host: bool = False
    ) -> DiskAttempt:
        """Return the attempt that another process began."""
        run, step = map(int, ref.name.split("."))
        return cls(job, ref.attempt, step, run, fence, one_host)

    def seal(self, header: SealHeader, files: Sequence[FileEntry], _: Retention) -> Ref:
        return Ref(NAME, self.publish(header, files).name)

    def publish(self, header: SealHeader, files: Sequence[FileEntry]) -> Path:
        """Turn the attempt into a checkpoint. Leader only, after every part is finished: the
        contents of all files are durable, and all names once this has synced their directories.

        Args:
            files: all parts' files, as their writers described them.

        Returns:
            The checkpoint's directory. A checkpoint of another content that stands there already
            is superseded, an invalid one is set aside. If the attempt is of an earlier run that
            another one has gone past, it goes to the superseded ones itself; if not, those that it
            does not continue go there.

        Raises:
            CheckpointRejected: no checkpoint can hold that: too many files, one listed twice.
            RunSuperseded: another run has taken the job over.
            OSError: the storage failed; the attempt is not a checkpoint, or not yet a durable one.
        """
        data = encode(make_manifest(header, files))
        manifest = decode_manifest(data)  # do not seal what cannot be read
        try:
            for directory in directories_of(entry.path for entry in manifest.files):
                sync_directory(self.path / directory)
            write_atomic(self.path / MANIFEST_NAME, data, shared=self.shared)  # syncs the rest
        except FileNotFoundError:
            if os.path.lexists(self.path):
                raise  # else it was renamed already
        if self.fence is not None and is_stale(self.job, header, self.fence):
            why = f"run {header.run} was taken over"
            return supersede(self.job, self.path, why, header.checkpoint_name)
        if self.fence is not None and header.run < self.fence.number:
            self.fence.check()
            straighten(self.job, manifest, f"run {header.run} had gone on without it")
        return self._rename(self.job.checkpoint(header.epoch, header.step), manifest)

    def _rename(self, target: Path, manifest: Manifest) -> Path:
        for _ in range(3):
            # A run that takes over after this check moves the attempt away before it loads.
            if self.fence is not None:
                self.fence.check()
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
                if self._yields_to(target, manifest):
                    # The one that put it there may have been killed before it made it durable.
                    sync_directory(target.parent)
                    self.drop()
                    return target
            else:
                sync_directory(target.parent)
                sync_directory(self.job.attempts)
                return target
        raise OSError(errno.EEXIST, "another writer keeps taking the checkpoint's place", target)

    def _yields_to(self, target: Path, manifest: Manifest) -> bool:
        """Return whether the checkpoint in our place is as good as ours; else move it away."""
        try:
            if not stat.S_ISDIR(os.lstat(target).st_mode):
                # No restart would take a link or a file for a checkpoint.
                raise CheckpointRejected("it is not a directory")
            there = read_manifest(target)
            if there.attempt == self.identity:
                return True
            verify_full(target)
            if has_same_state(there, manifest) or is_later(there, manifest):
                return True
            replace_by(self.job, target, there, manifest)
        except FileNotFoundError:
            return False  # it has just gone away
        except CheckpointError as error:
            set_aside(self.job, target, str(error))
        return False

    def _is_ours(self, target: Path) -> bool:
        try:
            return read_manifest(target).attempt == self.identity
        except CheckpointError:
            return False

    def drop(self) -> None:
        """Remove the attempt, whatever is in it; what cannot be removed waits for a recovery."""
        if self.job.owns(self.job.attempts):
            remove_tree(self.path)
