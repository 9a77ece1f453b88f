"""xxh3_128 of files: on the way to the disk, and in a pass of their own before a load.

Reading, writing and hashing run beside each other: the hash works on one buffer while the kernel
fills or takes another. Both release Python's lock.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import xxhash

from elastic_ckpt.core.manifest import FileEntry
from elastic_ckpt.core.progress import Advance, ignore
from elastic_ckpt.store.files import create_file, open_regular

CHUNK_BYTES: Final = 4 * 1024 * 1024


class HashedFile:
    """A new file; what is written to it is hashed on the way. Made by :class:`PartWriter`.

    Has what ``torch.save`` asks of a file: ``write`` and ``flush``. An error stays in ``error``,
    because not every caller lets it through.
    """

    def __init__(self, path: Path) -> None:
        self._fd = create_file(path)
        self._digest = xxhash.xxh3_128()
        self._bytes = 0
        self._helper: ThreadPoolExecutor | None = None
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Append anything with a buffer; all of it is written."""
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), CHUNK_BYTES):
                self._write_chunk(view[start : start + CHUNK_BYTES])
        except OSError as error:
            self.error = error
            raise
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""

    def sync(self) -> None:
        """Make the contents durable."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close; durable only after :meth:`sync`."""
        if self._helper is not None:
            self._helper.shutdown()
        os.close(self._fd)

    def entry(self, path: str, rank: int) -> FileEntry:
        """What was written, as the manifest lists it."""
        return FileEntry(path, self._bytes, self._digest.hexdigest(), rank)

    def _write_chunk(self, chunk: memoryview) -> None:
        hashed: Future[None] | None = None
        if len(chunk) == CHUNK_BYTES:
            if self._helper is None:
                self._helper = ThreadPoolExecutor(1, "hash")
            hashed = self._helper.submit(self._digest.update, chunk)
        else:
            self._digest.update(chunk)
        try:
            written = 0
            while written < len(chunk):
                written += os.write(self._fd, chunk[written:])
        finally:
            if hashed is not None:
                hashed.result()
        self._bytes += len(chunk)


def hash_file(path: Path, advance: Advance = ignore) -> tuple[int, str]:
    """Size in bytes and xxh3_128 of a regular file; a link is refused with ``OSError``."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size <= CHUNK_BYTES:
            return _hash_small(fd, size, advance)
        return _hash_large(fd, size, advance)
    finally:
        os.close(fd)


def _hash_small(fd: int, expected: int, advance: Advance) -> tuple[int, str]:
    digest, size = xxhash.xxh3_128(), 0
    while data := os.read(fd, expected + 1):
        digest.update(data)
        size += len(data)
        advance(len(data))
        if size > expected:
            break  # it grows; who writes to it faster than we read would keep us for ever
    return size, digest.hexdigest()


def _hash_large(fd: int, expected: int, advance: Advance) -> tuple[int, str]:
    """Hash one buffer in a thread while the next one is filled."""
    digest, size = xxhash.xxh3_128(), 0
    filling, hashing = (memoryview(bytearray(CHUNK_BYTES)) for _ in range(2))
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1, "hash") as helper:
        while count := os.readv(fd, [filling]):
            if pending is not None:
                pending.result()
            pending = helper.submit(digest.update, filling[:count])
            filling, hashing = hashing, filling
            size += count
            advance(count)
            if size > expected:
                break
        if pending is not None:
            pending.result()
    return size, digest.hexdigest()
