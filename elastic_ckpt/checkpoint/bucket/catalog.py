"""The checkpoints in a bucket, newest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from elastic_ckpt.checkpoint.bucket.keys import SealKey, seals_of
from elastic_ckpt.checkpoint.bucket.ownership import newest_claim, read_told
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.jobdir.paths import is_session_name
from elastic_ckpt.util.text import printable


@dataclass(frozen=True)
class Listed:
    """A seal as a listing shows it.

    Attributes:
        modified: when it was sealed, in seconds since the epoch by the store's clock.
        superseded: a later owner has gone past it by another way.
    """

    seal: SealKey
    modified: float
    superseded: bool = False


def sessions(store: Bucket, told: Mapping[str, str] | None = None) -> list[str]:
    """Return the names of the sessions that have checkpoints, the unnamed one, "", first; ``told``
    as in :func:`newest`. Lists every object of the named ones."""
    keys = (one.key.split("/") for page in store.listing("sessions/") for one in page)
    named = {key[1] for key in keys if len(key) > 3 and key[2] == "seals"} | set(told or ())
    return ["", *sorted(name for name in named if is_session_name(name))]


def listed(store: Bucket, session: str = "") -> Iterator[Listed]:
    """Yield the seals of a session, newest first; one request per thousand, as they are used."""
    lowest: tuple[int, int] | None = None  # (epoch, step) that a later owner has sealed
    claim, lowest_of_claim = 0, None
    for page in store.listing(seals_of(session)):
        for one in page:
            seal = SealKey.parse(session, one.key)
            if seal is None:
                continue
            place = (seal.epoch, seal.step)
            if seal.claim != claim:
                known = [key for key in (lowest, lowest_of_claim) if key is not None]
                claim, lowest, lowest_of_claim = seal.claim, min(known, default=None), place
            lowest_of_claim = min(place, lowest_of_claim or place)
            yield Listed(seal, one.modified, lowest is not None and place >= lowest)


def newest(
    store: Bucket, session: str = "", told: Mapping[str, str] | None = None
) -> SealKey | None:
    """Return the newest seal, in three requests, or four if a listing lacks it; None without any.

    A store may list what was there a while ago. What its owner has reported as saved, it
    has written down, and that is read by its name.

    Args:
        told: the newest keys of all sessions as the caller's own claim has them: an owner must not
            rely on a listing of owners either.
    """
    first = next((one.seal for one in listed(store, session)), None)
    if told is None:
        told = read_told(store, newest_claim(store)) or {}
    last = SealKey.parse(session, told.get(session, ""))
    if last is None or last == first or (first is not None and last.age < first.age):
        return first
    return last if is_there(store, last.key) else first  # it may have been taken away since


def is_there(store: Bucket, key: str) -> bool:
    """Return whether a seal is there, which a listing may not tell."""
    try:
        store.get(key, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        return False
    return True


def current(
    store: Bucket, session: str = "", told: Mapping[str, str] | None = None
) -> Iterator[Listed]:
    """Yield the seals of a session that are not superseded, newest first; ``told`` as in
    :func:`newest`, whose seal is the first one even if no listing shows it yet."""
    first = newest(store, session, told)
    if first is None:
        return
    every = listed(store, session)
    head = next(every, None)
    if head is not None and head.seal == first:
        yield head
    else:
        yield Listed(first, 0.0)
        every = chain([head] if head else [], every)
    yield from (one for one in every if not one.superseded and one.seal != first)


def read_intact(store: Bucket, seal: SealKey) -> Manifest:
    """Return the manifest of a checkpoint whose files are there with their sizes, and no others.

    Raises:
        CheckpointRejected, UnsupportedFormat, BucketFailed: as :func:`read_seal`.
    """
    manifest = read_seal(store, seal)
    expected = {seal.data + entry.path: entry.bytes for entry in manifest.files}
    there = {one.key: one.bytes for page in store.listing(seal.data) for one in page}
    for key in sorted(expected.keys() | there.keys()):
        if expected.get(key) != there.get(key):
            name = printable(key[len(seal.data) :], 200)
            what = "is missing" if key not in there else "has another size"
            raise CheckpointRejected(f"{name} {what if key in expected else 'is not listed'}")
    return manifest


def read_seal(store: Bucket, seal: SealKey) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointRejected: it is not sealed any more, or its manifest is not of this key.
        UnsupportedFormat: a newer version wrote it.
        BucketFailed: the store does not answer.
    """
    try:
        manifest = decode_manifest(store.get(seal.key, MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        raise CheckpointRejected(f"{seal.name} is not in {store.url} any more") from None
    if SealKey.of(manifest, seal.claim) != seal:
        raise CheckpointRejected(f"the manifest of {seal.name} is that of another checkpoint")
    return manifest
