"""Where the bytes of a sealed checkpoint are read from, and that they are its bytes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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

AHEAD: Final = 4
"""Requests under way at once, of one file: 32 MB."""

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


def in_bucket(store: Bucket, seal: SealKey) -> Source:
    """Read a checkpoint in a store, several requests at a time."""
    return lambda entry: _checked(entry, _fetched(store, seal.data + entry.path, entry.bytes))


def _fetched(store: Bucket, key: str, size: int) -> Iterator[memoryview]:
    waiting: deque[Future[memoryview]] = deque()
    starts = iter(range(0, size, FETCH_BYTES))
    with ThreadPoolExecutor(AHEAD, "fetch") as pool:
        try:
            while True:
                while len(waiting) < AHEAD and (start := next(starts, None)) is not None:
                    length = min(FETCH_BYTES, size - start)
                    waiting.append(pool.submit(store.get_range, key, start, length))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for asked in waiting:
                asked.cancel()


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
