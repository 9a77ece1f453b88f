"""One try at writing one checkpoint, from an empty directory to the seal.

::

    .attempts/120-3f9c.../        every rank writes its files, then its part manifest, last
    .attempts/120-3f9c.../manifest.json           the seal, written once all parts are known
    epoch-0_step-120/                             one rename: now it is a checkpoint

A kill between any two system calls leaves an attempt, which nobody loads, or a checkpoint.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_ckpt.core.manifest import (
    FileEntry,
    Manifest,
    PartManifest,
    SealHeader,
    decode_part,
    encode,
    make_manifest,
)
from elastic_ckpt.errors import CheckpointError, CheckpointRejected, UnsupportedFormat
from elastic_ckpt.store.files import hash_file, seal_file, sync_directory, sync_tree, write_atomic
from elastic_ckpt.store.layout import JobDirectory
from elastic_ckpt.store.quarantine import set_aside
from elastic_ckpt.store.verify import (
    MANIFEST_NAME,
    read_manifest,
    verify_files,
    verify_full,
    verify_sizes,
)

_NAME = re.compile(r"(0|[1-9][0-9]{0,17})-([0-9a-f]{16})")


@dataclass(frozen=True)
class Attempt:
    """A directory that one attempt writes to; made by the leader rank alone."""

    job: JobDirectory
    identity: str
    step: int

    @classmethod
    def begin(cls, job: JobDirectory, step: int) -> Attempt:
        """Make a fresh directory. Leader only."""
        attempt = cls(job, secrets.token_hex(8), step)
        (attempt.path / "parts").mkdir(parents=True)
        (attempt.path / "ranks").mkdir()
        return attempt

    @property
    def path(self) -> Path:
        """The directory."""
        return self.job.attempts / f"{self.step}-{self.identity}"

    def write_part(
        self, rank: int, world_size: int, paths: Iterable[str], header: SealHeader | None
    ) -> list[FileEntry]:
        """Make a rank's files durable and write its part manifest, last. Every rank.

        Args:
            paths: the files that this rank wrote, relative to the attempt.
            header: what the checkpoint is; rank 0 gives it.

        Returns:
            The part's files and the part manifest itself, for the leader's seal.
        """
        files = [seal_file(self.path, path, rank) for path in paths]
        for directory in sorted({(self.path / entry.path).parent for entry in files}):
            sync_directory(directory)
        part = PartManifest(
            attempt=self.identity, rank=rank, world_size=world_size, files=files, header=header
        )
        name = f"parts/{rank:05d}.json"
        write_atomic(self.path / name, encode(part))
        size, digest = hash_file(self.path / name)
        return [*files, FileEntry(name, size, digest, rank)]

    def seal(self, header: SealHeader, files: Sequence[FileEntry]) -> Path:
        """Turn the attempt into a checkpoint. Leader only, after every part is durable.

        Args:
            files: all parts' files, as their writers described them.

        Returns:
            The checkpoint's directory. If a valid checkpoint stands there already it is kept
            and the attempt dropped; an invalid one is set aside.

        Raises:
            OSError: the disk said no; the attempt is not a checkpoint.
        """
        sync_tree(self.path)
        write_atomic(self.path / MANIFEST_NAME, encode(make_manifest(header, files)))
        return self._publish(self.job.checkpoint(header.epoch, header.step))

    def _publish(self, target: Path) -> Path:
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
                    self.drop()
                    return target
            else:
                sync_directory(target.parent)
                sync_directory(self.job.attempts)
                return target
        raise OSError(errno.EEXIST, "another writer keeps taking the checkpoint's place", target)

    def _yields_to(self, target: Path) -> bool:
        """Whether the checkpoint that stands in our place is as good as ours."""
        try:
            if not stat.S_ISDIR(os.lstat(target).st_mode):
                # No restart would take a link or a file for a checkpoint.
                raise CheckpointRejected("it is no directory")
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
        """Remove the attempt, whatever is in it."""
        shutil.rmtree(self.path, ignore_errors=True)


def recover_attempts(
    job: JobDirectory, hurry: Callable[[], bool] = lambda: False
) -> list[tuple[Path, str]]:
    """Seal every attempt that is complete and verified, remove the others.

    Only the holder of the job's lock may call this, before it launches anybody: no attempt has
    a writer then. Calling it again changes nothing. An attempt that cannot be read or sealed
    now (an I/O error, a full disk), or that a newer version wrote, is left as it is: nobody
    loads it, and it must not keep the job from running.

    Args:
        hurry: asked before each attempt, which may take minutes to hash; True leaves the rest
            to the next start.

    Returns:
        For each attempt found: its path, or that of the checkpoint that it became, and what
        was done with it.
    """
    done: list[tuple[Path, str]] = []
    for entry in sorted(os.scandir(job.attempts), key=lambda entry: entry.name):
        if hurry():
            break
        match = _NAME.fullmatch(entry.name)
        if match is None or not entry.is_dir(follow_symlinks=False):
            continue
        attempt = Attempt(job, match[2], int(match[1]))
        try:
            manifest = _complete(attempt)
            target = attempt.seal(manifest, manifest.files)
        except (UnsupportedFormat, OSError) as error:
            done.append((attempt.path, f"left as it is: {error}"))
        except CheckpointError as error:
            attempt.drop()
            done.append((attempt.path, f"removed: {error}"))
        else:
            done.append((target, "sealed"))
    return done


def _complete(attempt: Attempt) -> Manifest:
    """The manifest of an attempt whose parts are all there and verified in full."""
    if (attempt.path / MANIFEST_NAME).exists():
        manifest = read_manifest(attempt.path)
    else:
        manifest = _from_parts(attempt)
    if (manifest.attempt, manifest.step) != (attempt.identity, attempt.step):
        raise CheckpointRejected("it says that it is another attempt or step")
    verify_sizes(attempt.path, manifest.files)
    verify_files(attempt.path, manifest.files)
    return manifest


def _from_parts(attempt: Attempt) -> Manifest:
    files: list[FileEntry] = []
    first = _read_part(attempt, 0, files)
    if first.header is None:
        raise CheckpointRejected("part 0 does not say what the checkpoint is")
    if first.header.world_size != first.world_size:
        raise CheckpointRejected("part 0 contradicts itself about the world size")
    for rank in range(1, first.world_size):
        part = _read_part(attempt, rank, files)
        if part.world_size != first.world_size:
            raise CheckpointRejected(f"part {rank} is of another world size")
    return make_manifest(first.header, files)


def _read_part(attempt: Attempt, rank: int, files: list[FileEntry]) -> PartManifest:
    name = f"parts/{rank:05d}.json"
    path = attempt.path / name
    if not path.is_file():
        raise CheckpointRejected(f"incomplete: {name} is missing")
    part = decode_part(path.read_bytes())
    if part.rank != rank or part.attempt != attempt.identity:
        raise CheckpointRejected(f"{name} belongs to another rank or attempt")
    size, digest = hash_file(path)
    files.extend([*part.files, FileEntry(name, size, digest, rank)])
    return part
