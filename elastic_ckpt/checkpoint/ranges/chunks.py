"""Chunks of large files: fetched, verified, and put into local files with holes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import xxhash

from elastic_ckpt.checkpoint.disk.file_digest import BLOCK_BYTES
from elastic_ckpt.checkpoint.manifest import CHUNK_BYTES, FileEntry
from elastic_ckpt.checkpoint.tier import Ranges
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.util.files import open_regular
from elastic_ckpt.util.progress import Advance


class Chunk(NamedTuple):
    """Bytes of a file that have a digest of their own; it is empty where ``Fetch`` knows it."""

    path: str
    begin: int
    bytes: int
    xxh3_128: str

    @classmethod
    def of(cls, entry: FileEntry, index: int) -> Chunk:
        """Return one chunk of a file that has several."""
        begin = index * CHUNK_BYTES
        length = min(CHUNK_BYTES, entry.bytes - begin)
        return cls(entry.path, begin, length, entry.chunks[index])


def is_cut(entry: FileEntry) -> bool:
    """Return whether only some of its chunks are brought; JSON says what the other files hold."""
    return bool(entry.chunks) and not entry.path.endswith(".json")


def chunks_in(entry: FileEntry, ranges: Ranges | None) -> set[int]:
    """Return which chunks of a file a rank reads: all, unless it names ranges of this file."""
    if ranges is None or entry.path not in ranges:
        return set(range(len(entry.chunks)))
    found: set[int] = set()
    for begin, end in ranges[entry.path]:
        last = min(end, entry.bytes) - 1
        if begin <= last:
            found.update(range(max(0, begin) // CHUNK_BYTES, last // CHUNK_BYTES + 1))
    return found


Fetch = Callable[[Chunk], memoryview]
"""Returns the bytes of a chunk. FileNotFoundError or CheckpointRejected if there are none, OSError
or BucketFailed if they cannot be read. Any thread."""


class LocalChunks:
    """The large files of a checkpoint on this machine, of which some chunks are there.

    Args:
        fetch: reads a chunk from where the checkpoint is.
        threads: requests under way at once, and chunks in memory.
    """

    def __init__(self, fetch: Fetch, directory: Path, threads: int) -> None:
        self._fetch = fetch
        self._directory = directory
        self._threads = threads

    def make(self, entry: FileEntry) -> None:
        """Have a file of its size, with what it holds already; one process at a time."""
        path = self._directory / entry.path
        with suppress(FileNotFoundError):
            found = os.lstat(path)
            if (found.st_size, found.st_nlink) == (entry.bytes, 1) and stat.S_ISREG(found.st_mode):
                return
            path.unlink()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(fd, entry.bytes)
        finally:
            os.close(fd)

    def bring(self, chunks: Sequence[Chunk], advance: Advance) -> None:
        """Fetch the chunks that are not here yet; nothing is written that does not match.

        Raises:
            CheckpointRejected: one does not match, or is missing in the store.
            BucketFailed, OSError: the store does not answer, or this machine's disk failed.
        """
        # Before the first write: a file's lock makes each question wait for the writes to it.
        written = {chunk for chunk in chunks if not self._is_hole(chunk)}
        with ThreadPoolExecutor(self._threads, "fetch") as pool:
            running = [pool.submit(self._bring, chunk, chunk in written) for chunk in chunks]
            try:
                for chunk, one in zip(chunks, running, strict=True):
                    one.result()
                    advance(chunk.bytes)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def check(self, chunks: Iterable[Chunk]) -> None:
        """Raise CheckpointRejected unless these chunks are here."""
        for chunk in chunks:
            try:
                is_here = self._has(chunk)
            except FileNotFoundError:
                is_here = False
            if not is_here:
                raise CheckpointRejected(f"{chunk.path} was changed while it was loaded")

    def _bring(self, chunk: Chunk, may_be_here: bool) -> None:
        if may_be_here and self._has(chunk):
            return
        try:
            data = self._fetch(chunk)
        except FileNotFoundError:
            raise CheckpointRejected(f"{chunk.path} is missing") from None
        if chunk.xxh3_128 and xxhash.xxh3_128_hexdigest(data) != chunk.xxh3_128:
            raise CheckpointRejected(f"{chunk.path} does not match its checksum")
        fd = os.open(self._directory / chunk.path, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            begin = chunk.begin
            while data:
                count = os.pwrite(fd, data, begin)
                data, begin = data[count:], begin + count
        finally:
            os.close(fd)

    def _has(self, chunk: Chunk) -> bool:
        fd = open_regular(self._directory / chunk.path)
        try:
            digest, begin, end = xxhash.xxh3_128(), chunk.begin, chunk.begin + chunk.bytes
            while data := os.pread(fd, min(BLOCK_BYTES, end - begin), begin):
                digest.update(data)
                begin += len(data)
        finally:
            os.close(fd)
        return digest.hexdigest() == chunk.xxh3_128

    def _is_hole(self, chunk: Chunk) -> bool:
        """Return whether nothing was written there; a file system may not know."""
        fd = open_regular(self._directory / chunk.path)
        try:
            return os.lseek(fd, chunk.begin, os.SEEK_DATA) >= chunk.begin + chunk.bytes
        except OSError as error:
            return error.errno == errno.ENXIO  # a hole up to the end
        finally:
            os.close(fd)
