"""One rank's part of an attempt: its files, hashed and made durable, then its part manifest."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from elastic_ckpt.checkpoint.disk.hashed_file import LARGE_BYTES, HashedFile, StagedFile, hash_file
from elastic_ckpt.checkpoint.manifest import (
    FileEntry,
    PartManifest,
    SealHeader,
    check_path,
    encode,
)
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.util.files import (
    create_directory,
    group_may_read,
    open_regular,
    set_mode,
    sync_directory,
    write_atomic,
)


def part_name(rank: int) -> str:
    """Path of a rank's part manifest in its attempt."""
    return f"parts/{rank:05d}.json"


class DiskPart:
    """Writes the files of one rank in one attempt. Not collective; any rank, any order.

    Args:
        directory: the attempt's.
        attempt: its identity.
        rank: whose part this is.
    """

    def __init__(self, directory: Path, attempt: str, rank: int) -> None:
        self._directory = directory
        self._attempt = attempt
        self._entries: dict[str, FileEntry] = {}
        self.rank = rank

    @property
    def paths(self) -> list[str]:
        """The files that are in this part, relative to the attempt."""
        return list(self._entries)

    @contextmanager
    def open(
        self, path: str, size: int | None = None, *, paged: bool = False
    ) -> Iterator[HashedFile | StagedFile]:
        """A new file of this part, durable when the block ends.

        Args:
            path: relative to the attempt; directories that are missing are made.
            size: bytes that will be written, if the caller knows; a large file then passes the
                page cache by.
            paged: each write but the last is whole pages at the address of a page.

        Raises:
            OSError: the file exists, or the storage failed.
        """
        check_path(path)
        target = self._directory / path
        if not target.parent.is_dir():
            self._make_parents(target.parent)
        hashed = HashedFile(target, size or 0)
        file = hashed if paged or not hashed.direct else StagedFile(hashed)
        try:
            try:
                yield file
            finally:
                if file.error is not None:
                    raise file.error
            file.sync()
        finally:
            file.close()
        self._entries[path] = file.entry(path, self.rank)

    def write(self, path: str, data: bytes) -> None:
        """A small file; raises as :meth:`open`."""
        with self.open(path) as file:
            file.write(data)

    def claim(self, path: str) -> None:
        """Add a file that other code has written to this part.

        Raises:
            CheckpointRejected: it is not a regular file, or has another name.
            OSError: it cannot be read or made durable.
        """
        check_path(path)
        target = self._directory / path
        fd = open_regular(target)
        try:
            status = os.fstat(fd)
            if status.st_nlink != 1:
                raise CheckpointRejected(f"{path} has another name: hard links are not followed")
            wanted = 0o640 if group_may_read(self._directory) else 0o600
            if stat.S_IMODE(status.st_mode) != wanted:
                set_mode(fd, wanted)
            size, digest = _sync_and_hash(fd, status.st_size, target)
        finally:
            os.close(fd)
        self._entries[path] = FileEntry(path, size, digest, self.rank)

    def finish(self, world_size: int, header: SealHeader | None) -> list[FileEntry]:
        """Make the names durable and write the part manifest, last.

        Args:
            header: what the checkpoint is; rank 0 gives it.

        Returns:
            The part's files and the part manifest itself, for the leader's seal.
        """
        for directory in sorted({(self._directory / path).parent for path in self._entries}):
            sync_directory(directory)
        part = PartManifest(
            attempt=self._attempt,
            rank=self.rank,
            world_size=world_size,
            files=list(self._entries.values()),
            header=header,
        )
        name, data = part_name(self.rank), encode(part)
        write_atomic(self._directory / name, data)
        digest = xxhash.xxh3_128_hexdigest(data)
        return [*part.files, FileEntry(name, len(data), digest, self.rank)]

    def _make_parents(self, directory: Path) -> None:
        if not directory.parent.is_dir():
            self._make_parents(directory.parent)
        with suppress(FileExistsError):  # another rank was faster
            create_directory(directory)


def _sync_and_hash(fd: int, size: int, path: Path) -> tuple[int, str]:
    """The disk and the hash have nothing to do with each other: a large file has both at once."""
    if size < LARGE_BYTES:
        os.fsync(fd)
        return hash_file(path)
    with ThreadPoolExecutor(1, "fsync") as helper:
        synced = helper.submit(os.fsync, fd)
        found = hash_file(path)
        synced.result()
    return found
