"""A sealed checkpoint on its way into a bucket, and out of it into another tier."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.ownership import BucketClaim
from elastic_ckpt.checkpoint.bucket.source import Source
from elastic_ckpt.checkpoint.bucket.store import Bucket, create
from elastic_ckpt.checkpoint.disk.part import part_name
from elastic_ckpt.checkpoint.disk.side_by_side import side_by_side
from elastic_ckpt.checkpoint.manifest import (
    FileEntry,
    Manifest,
    decode_manifest,
    encode,
    header_of,
)
from elastic_ckpt.checkpoint.tier import Tier
from elastic_ckpt.errors import BucketFailed
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.progress import Advance, ignore

SMALL_BYTES: Final = 4 * 1024 * 1024
"""Up to here an object is written by one request."""


def push(
    claim: BucketClaim, source: Source, manifest: Manifest, advance: Advance = ignore
) -> SealKey:
    """Copy a checkpoint into the bucket, and seal it there with the manifest that it has.

    What an earlier try has uploaded is not sent again. The claim is asked before the seal and
    after it: who has claimed later sees this seal, or this owner is told that it is none.

    Args:
        advance: called with each number of bytes that were handed to the store or are there
            already, by one thread at a time; may wait, or raise to stop.

    Raises:
        CheckpointRejected: a file is not what the manifest says; nothing is sealed.
        RunSuperseded: another run owns the bucket.
        BucketFailed, BucketRefused: the store failed; a repeat goes on.
        OSError: a file cannot be read.
    """
    store = claim.store
    seal = SealKey.of(manifest, claim.number)
    # An object appears whole, under a name that only this attempt of this owner has.
    there = {one.key: one.bytes for page in store.listing(seal.data) for one in page}
    files = manifest.files
    missing = [entry for entry in files if there.get(seal.data + entry.path) != entry.bytes]
    total = sum(entry.bytes for entry in missing)
    advance(manifest.total_bytes - total)
    side_by_side(partial(send, store, seal.data, source), missing, total, advance)
    claim.check()
    _create(claim, seal, manifest)
    return seal


def seal_uploaded(claim: BucketClaim, manifest: Manifest) -> SealKey:
    """Seal what other processes have uploaded, if all of it is there. A repeat changes nothing.

    Raises:
        RunSuperseded: another run owns the bucket.
        BucketFailed, BucketRefused: the store failed, or lacks a file; nothing was sealed for sure.
    """
    store = claim.store
    seal = SealKey.of(manifest, claim.number)
    decode_manifest(encode(manifest))  # do not seal what cannot be read
    with claim.alone():  # or what is not kept would be deleted between the look and the seal
        there = {one.key: one.bytes for page in store.listing(seal.data) for one in page}
        for entry in manifest.files:
            key = seal.data + entry.path
            if there.get(key) != entry.bytes:
                raise BucketFailed(f"{store.url}/{key} was uploaded and is not there")
        claim.check()
        _create(claim, seal, manifest)
    return seal


def _create(claim: BucketClaim, seal: SealKey, manifest: Manifest) -> None:
    if not create(claim.store, seal.key, encode(manifest)):
        raise BucketFailed(f"{claim.store.url}/{seal.key} is there with another content")
    claim.sealed(seal.session, seal.key)


def send(store: Bucket, prefix: str, source: Source, entry: FileEntry, advance: Advance) -> None:
    """Upload one file; raises what the source or the store does."""

    def told() -> Iterator[memoryview]:
        for data in source(entry):
            yield data
            advance(len(data))

    if entry.bytes > SMALL_BYTES:
        store.upload(prefix + entry.path, told(), entry.bytes)
    else:
        store.put(prefix + entry.path, b"".join(told()))


def in_order(manifest: Manifest) -> list[FileEntry]:
    """Return the files in the order in which :func:`pull` reads them: rank by rank, without the
    part manifests, which are the target's own affair."""
    files = [entry for entry in manifest.files if entry.path != part_name(entry.rank)]
    return sorted(files, key=lambda entry: entry.rank)


def pull(source: Source, manifest: Manifest, target: Tier, advance: Advance = ignore) -> None:
    """Copy a checkpoint into another tier, and seal it there once every byte matches.

    Does nothing if the target holds the attempt already. Killed at any moment it leaves nothing
    that could be loaded.

    Raises:
        CheckpointRejected: a file is not what the manifest says.
        TierFull: there is no room.
        BucketFailed, BucketRefused, OSError: the source or the target failed.
    """
    if target.holds(manifest):
        return
    attempt = target.begin(manifest.step, manifest.total_bytes, manifest.attempt)
    header = header_of(manifest)
    files: list[FileEntry] = []
    try:
        for rank in range(manifest.world_size):
            part = attempt.part(rank)
            for entry in in_order(manifest):
                if entry.rank == rank:
                    with part.open(entry.path, entry.bytes) as file:
                        for data in source(entry):
                            file.write(data)
                            advance(len(data))
            files += part.finish(manifest.world_size, header if rank == 0 else None)
        attempt.seal(header, files, Retention())
    except BaseException:
        attempt.drop()
        raise
