"""A checkpoint on its way from a bucket into another tier."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import xxhash

from elastic_ckpt.checkpoint.bucket.catalog import read_seal
from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.store import Store
from elastic_ckpt.checkpoint.disk.part import part_name
from elastic_ckpt.checkpoint.manifest import FileEntry, Manifest, header_of
from elastic_ckpt.checkpoint.tier import Part, Tier
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.progress import Advance, ignore

CHUNK_BYTES: Final = 8 * 1024 * 1024
"""Of one request."""

AHEAD: Final = 8
"""Requests under way at once, of one checkpoint: with what is written, 72 MB."""


def pull(store: Store, seal: SealKey, target: Tier, advance: Advance = ignore) -> Manifest:
    """Copy a checkpoint out of the bucket, and seal it in another tier once every byte matches.

    Does nothing if the target holds the attempt already. Killed at any moment it leaves nothing
    that could be loaded.

    Raises:
        CheckpointRejected: it is damaged, or not in the bucket any more.
        UnsupportedFormat: a newer version wrote it.
        TierFull: there is no room.
        BucketFailed, BucketRefused, OSError: the store or the target failed.
    """
    manifest = read_seal(store, seal)
    if target.holds(manifest):
        return manifest
    attempt = target.begin(manifest.step, manifest.total_bytes, manifest.attempt)
    header = header_of(manifest)
    try:
        files: list[FileEntry] = []
        with ThreadPoolExecutor(AHEAD, "fetch") as pool:
            for rank in range(manifest.world_size):
                part = attempt.part(rank)
                for entry in manifest.files:
                    # The target writes the part manifests itself, as part of its own protocol.
                    if entry.rank == rank and entry.path != part_name(rank):
                        _copy(store, seal, entry, part, pool, advance)
                files += part.finish(manifest.world_size, header if rank == 0 else None)
        attempt.seal(header, files, Retention())
    except BaseException:
        attempt.drop()
        raise
    return manifest


def _copy(
    store: Store,
    seal: SealKey,
    entry: FileEntry,
    part: Part,
    pool: ThreadPoolExecutor,
    advance: Advance,
) -> None:
    with part.open(entry.path, entry.bytes) as target:
        for data in _fetched(store, seal, entry, pool):
            target.write(data)
            advance(len(data))


def _fetched(
    store: Store, seal: SealKey, entry: FileEntry, pool: ThreadPoolExecutor
) -> Iterator[memoryview]:
    """Yield a file's bytes in order, with some requests ahead; raise at its end if they are not
    those of the manifest."""
    digest = xxhash.xxh3_128()
    waiting: deque[tuple[int, Future[memoryview]]] = deque()
    starts = iter(range(0, entry.bytes, CHUNK_BYTES))
    try:
        while True:
            while len(waiting) < AHEAD and (start := next(starts, None)) is not None:
                length = min(CHUNK_BYTES, entry.bytes - start)
                asked = pool.submit(store.get_range, seal.data + entry.path, start, length)
                waiting.append((length, asked))
            if not waiting:
                break
            length, asked = waiting.popleft()
            data = asked.result()
            if len(data) != length:
                raise CheckpointRejected(f"{entry.path} is shorter than its manifest says")
            digest.update(data)
            yield data
        if digest.hexdigest() != entry.xxh3_128:
            raise CheckpointRejected(f"{entry.path} does not match its checksum")
    except FileNotFoundError:
        raise CheckpointRejected(f"{entry.path} is missing") from None
    finally:
        for _, asked in waiting:
            asked.cancel()
