"""One rank's part of an attempt: its files, hashed and made durable, then its part manifest."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
from elastic_ckpt.checkpoint.part_files import PartFiles
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


class DiskPart(PartFiles):
    """A part on disk: each file is durable when its block ends."""

    def __init__(self, directory: Path, attempt: str, rank: int) -> None:
        super().__init__(directory, rank)
        self._attempt = attempt

    def _create(self, path: str, size: int | None, paged: bool) -> HashedFile | StagedFile:
        """Create a file; a large one of known size passes the page cache by."""
        target = self._directory / path
        if not target.parent.is_dir():
            self._make_parents(target.parent)
        hashed = HashedFile(target, size or 0)
        return hashed if paged or not hashed.direct else StagedFile(hashed)

    def claim(self, path: str) -> None:
        check_path(path)
        target = self._directory / path
        with open(open_regular(target), "rb") as file:
            fd = file.fileno()
            status = os.fstat(fd)
            if status.st_nlink != 1:
                raise CheckpointRejected(f"{path} has another name: hard links are not followed")
            wanted = 0o640 if group_may_read(self._directory) else 0o600
            if stat.S_IMODE(status.st_mode) != wanted:
                set_mode(fd, wanted)
            size, digest = _sync_and_hash(fd, status.st_size, target)
        self._entries[path] = FileEntry(path, size, digest, self.rank)

    def finish(self, world_size: int, header: SealHeader | None) -> list[FileEntry]:
        """Make the names durable and write the part manifest, last; it is one of the files."""
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
