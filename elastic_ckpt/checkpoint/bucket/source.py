"""Where the bytes of a sealed checkpoint are read from, and that they are its bytes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import xxhash

from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.manifest import FileEntry
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.util.files import open_regular

READ_BYTES: Final = 4 * 1024 * 1024
"""Read from a file at once."""

FETCH_BYTES: Final = 8 * 1024 * 1024
"""Of one request to a store."""

AHEAD: Final = 8
"""Requests under way at once, of one checkpoint: 64 MB, or 128 MB of chunks."""

Source = Callable[[FileEntry], Iterator[memoryview]]
"""Yields the bytes of a file, in order. Raises CheckpointRejected at its end unless they are those
of the manifest, OSError or BucketFailed if they cannot be read. Any thread."""


def in_directory(checkpoint: Path) -> Source:
    """Read a checkpoint that nobody deletes meanwhile."""

    def read(entry: FileEntry) -> Iterator[memoryview]:
        with open(open_regular(checkpoint / entry.path), "rb", buffering=0) as file:
            while data := os.read(file.fileno(), READ_BYTES):
                yield memoryview(data)

    return lambda entry: _checked(entry, read(entry))


@contextmanager
def in_bucket(
    store: Bucket, seal: SealKey, order: Sequence[FileEntry] = (), ahead: int = AHEAD
) -> Iterator[Source]:
    """Read a checkpoint in a store, several requests at a time, until the block ends.

    Args:
        order: the files in the order in which they will be read, as far as that is known: the next
            ones are fetched while one is written.
        ahead: requests under way at once.
    """
    with ThreadPoolExecutor(ahead, "fetch") as pool:
        reader = _Ahead(store, seal.data, order, pool, ahead)
        try:
            yield lambda entry: _checked(entry, reader.read(entry))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Ahead:
    """Keeps the next requests of a known order under way."""

    def __init__(
        self,
        store: Bucket,
        prefix: str,
        order: Sequence[FileEntry],
        pool: ThreadPoolExecutor,
        limit: int,
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._pool = pool
        self._limit = limit
        self._waiting: deque[tuple[str, Future[memoryview]]] = deque()
        self._next = self._ask(order)

    def read(self, entry: FileEntry) -> Iterator[memoryview]:
        """Yield a file's bytes: those on their way if it is the next one, else asked for now."""
        self._fill(self._waiting, self._next)
        if self._waiting and self._waiting[0][0] == entry.path:
            waiting, more = self._waiting, self._next
        else:
            waiting, more = deque(), self._ask([entry])
            self._fill(waiting, more)
        while waiting and waiting[0][0] == entry.path:
            data = waiting.popleft()[1].result()
            self._fill(waiting, more)
            yield data

    def _ask(self, entries: Iterable[FileEntry]) -> Iterator[tuple[str, Future[memoryview]]]:
        for entry in entries:
            for start in range(0, entry.bytes, FETCH_BYTES):
                length = min(FETCH_BYTES, entry.bytes - start)
                key = self._prefix + entry.path
                yield entry.path, self._pool.submit(self._store.get_range, key, start, length)

    def _fill(
        self,
        waiting: deque[tuple[str, Future[memoryview]]],
        more: Iterator[tuple[str, Future[memoryview]]],
    ) -> None:
        while len(waiting) < self._limit and (asked := next(more, None)) is not None:
            waiting.append(asked)


def _checked(entry: FileEntry, chunks: Iterator[memoryview]) -> Iterator[memoryview]:
    digest, size = xxhash.xxh3_128(), 0
    try:
        for data in chunks:
            size += len(data)
            if size > entry.bytes:
                break
            digest.update(data)
            yield data
    except FileNotFoundError:
        raise CheckpointRejected(f"{entry.path} is missing") from None
    if (size, digest.hexdigest()) != (entry.bytes, entry.xxh3_128):
        raise CheckpointRejected(f"{entry.path} does not match its checksum")
