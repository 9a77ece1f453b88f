"""One rank's part of an attempt: its files, hashed and made durable, then its part manifest."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath

from elastic_ckpt.checkpoint.disk.file_digest import Digest, digest_bytes
from elastic_ckpt.checkpoint.disk.hashed_file import (
    LARGE_BYTES,
    HashedFile,
    StagedFile,
    digest_file,
)
from elastic_ckpt.checkpoint.manifest import (
    FileEntry,
    PartManifest,
    SealHeader,
    check_path,
    encode,
)
from elastic_ckpt.checkpoint.part_files import PartFiles
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.util.files import (
    create_directory,
    group_may_read,
    open_regular,
    set_mode,
    sync_directory,
    write_atomic,
    write_new,
)


def part_name(rank: int) -> str:
    """Path of a rank's part manifest in its attempt."""
    return f"parts/{rank:05d}.json"


class DiskPart(PartFiles):
    """A part on disk: each file's contents are durable when its block ends."""

    def __init__(
        self,
        directory: Path,
        attempt: str,
        rank: int,
        *,
        shared: bool | None = None,
        leaves_names: bool = False,
    ) -> None:
        """
        Args:
            shared: whether the group may read the attempt, and so what is in it; None to find out.
            leaves_names: whether the seal makes the names durable, on this very kernel, so that
                :meth:`finish` need not.
        """
        super().__init__(directory, rank)
        self._attempt = attempt
        self._leaves_names = leaves_names
        self._known_shared = shared
        self._known = {directory}
        """Directories that exist, with our mode."""

    @property
    def _shared(self) -> bool:
        if self._known_shared is None:
            self._known_shared = group_may_read(self._directory)
        return self._known_shared

    def _create(self, path: str, size: int | None, paged: bool) -> HashedFile | StagedFile:
        """Create a file; a large one of known size passes the page cache by."""
        target = self._directory / path
        self._make(target.parent)
        hashed = HashedFile(target, size or 0, shared=self._shared)
        return hashed if paged or not hashed.direct else StagedFile(hashed)

    def claim(self, path: str) -> None:
        check_path(path)
        target = self._directory / path
        with open(open_regular(target), "rb") as file:
            fd = file.fileno()
            status = os.fstat(fd)
            if status.st_nlink != 1:
                raise CheckpointRejected(f"{path} has another name: hard links are not followed")
            wanted = 0o640 if self._shared else 0o600
            if stat.S_IMODE(status.st_mode) != wanted:
                set_mode(fd, wanted)
            digest = _sync_and_hash(fd, status.st_size, target)
        for directory in directories_of([path]):
            self._adopt(self._directory / directory)
        self._entries[path] = digest.entry(path, self.rank)

    def finish(self, world_size: int, header: SealHeader | None) -> list[FileEntry]:
        """Make the names durable, unless the seal does, and write the part manifest, last; it is
        one of the files."""
        part = PartManifest(
            attempt=self._attempt,
            rank=self.rank,
            world_size=world_size,
            files=list(self._entries.values()),
            header=header,
        )
        name, data = part_name(self.rank), encode(part)
        if not self._leaves_names:
            for directory in directories_of(self._entries):
                sync_directory(self._directory / directory)
            write_atomic(self._directory / name, data, shared=self._shared)
        else:
            try:
                write_new(self._directory / name, data, shared=self._shared)
            except FileExistsError:  # a repeat
                write_atomic(self._directory / name, data, shared=self._shared)
        return [*part.files, digest_bytes(data).entry(name, self.rank)]

    def expect(self, *directories: str) -> None:
        """Take it that these directories of the attempt exist, with our mode."""
        self._known.update(self._directory / one for one in directories)

    def _make(self, directory: Path) -> None:
        """Create a directory of the attempt, unless it is known to exist."""
        if directory in self._known:
            return
        self._make(directory.parent)
        with suppress(FileExistsError):  # another rank was faster
            create_directory(directory, shared=self._shared)
        self._known.add(directory)

    def _adopt(self, directory: Path) -> None:
        """Give a directory that other code created the mode of ours, whatever the umask."""
        if directory in self._known:
            return
        mode = stat.S_IMODE(os.lstat(directory).st_mode)
        wanted = 0o750 if self._shared else 0o700
        if mode & 0o777 != wanted:
            set_mode(directory, mode & stat.S_ISGID | wanted)
        self._known.add(directory)


def directories_of(paths: Iterable[str]) -> list[str]:
    """Return the directories inside an attempt that these files are in, the outer ones first."""
    inner = {path.rpartition("/")[0] for path in paths}  # thousands of files are in few of them
    found = {str(one) for path in inner for one in (path, *PurePosixPath(path).parents)}
    return sorted(found - {"", "."})


def _sync_and_hash(fd: int, size: int, path: Path) -> Digest:
    """The disk and the hash have nothing to do with each other: a large file has both at once."""
    if size < LARGE_BYTES:
        os.fsync(fd)
        return digest_file(path)
    with ThreadPoolExecutor(1, "fsync") as helper:
        synced = helper.submit(os.fsync, fd)
        found = digest_file(path)
        synced.result()
    return found
