"""A sealed checkpoint on its way from a directory into a bucket."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import xxhash

from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.ownership import Claim
from elastic_ckpt.checkpoint.bucket.store import Store, create
from elastic_ckpt.checkpoint.disk.side_by_side import side_by_side
from elastic_ckpt.checkpoint.manifest import FileEntry, Manifest, encode
from elastic_ckpt.errors import BucketFailed, CheckpointRejected
from elastic_ckpt.util.files import open_regular
from elastic_ckpt.util.progress import Advance, ignore

CHUNK_BYTES: Final = 4 * 1024 * 1024
"""Read, hashed and handed to the store at once."""


def push(claim: Claim, checkpoint: Path, manifest: Manifest, advance: Advance = ignore) -> SealKey:
    """Copy a checkpoint into the bucket, and seal it there with the manifest that it has.

    What an earlier try has uploaded is not sent again. The claim is asked before the seal and
    after it: who has claimed later sees this seal, or this owner is told that it is none.

    Args:
        checkpoint: its directory, which nobody deletes meanwhile.
        advance: called with each number of bytes that were handed to the store or are there
            already, by one thread at a time; may wait, or raise to stop.

    Raises:
        CheckpointRejected: a file is not what the manifest says; nothing is sealed.
        RunSuperseded: another run owns the bucket.
        BucketFailed, BucketRefused: the store failed; a repeat goes on.
        OSError: a file cannot be read.
    """
    seal = SealKey.of(manifest, claim.number)
    there = {
        one.key: one.bytes for page in claim.store.listing(seal.data) for one in page
    }  # an object appears whole, under a name that only this attempt has
    missing = [
        entry for entry in manifest.files if there.get(seal.data + entry.path) != entry.bytes
    ]
    advance(sum(entry.bytes for entry in manifest.files) - sum(entry.bytes for entry in missing))
    total = sum(entry.bytes for entry in missing)
    side_by_side(partial(_send, claim.store, seal, checkpoint), missing, total, advance)
    claim.check()
    if not create(claim.store, seal.key, encode(manifest)):
        raise BucketFailed(f"{claim.store.url}/{seal.key} is there with another content")
    claim.sealed(seal.key)
    return seal


def _send(
    store: Store, seal: SealKey, checkpoint: Path, entry: FileEntry, advance: Advance
) -> None:
    with open(open_regular(checkpoint / entry.path), "rb", buffering=0) as file:
        chunks = _checked(file.fileno(), entry, advance)
        if entry.bytes > CHUNK_BYTES:
            store.upload(seal.data + entry.path, chunks)
        else:
            store.put(seal.data + entry.path, b"".join(chunks))


def _checked(fd: int, entry: FileEntry, advance: Advance) -> Iterator[memoryview]:
    """Yield the bytes of a file; raise at its end, before the store has it whole, if it is not the
    one of the manifest."""
    digest, size = xxhash.xxh3_128(), 0
    while data := os.read(fd, CHUNK_BYTES):
        digest.update(data)
        size += len(data)
        if size > entry.bytes:
            break
        yield memoryview(data)
        advance(len(data))
    if (size, digest.hexdigest()) != (entry.bytes, entry.xxh3_128):
        raise CheckpointRejected(f"{entry.path} does not match its checksum")
