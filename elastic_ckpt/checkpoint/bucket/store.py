"""What a job needs of an object store. ``object_store.py`` has the real ones; the simulation has
one that loses answers, is late, and lists what was true a while ago."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from elastic_ckpt.errors import BucketFailed


@dataclass(frozen=True, order=True)
class StoredObject:
    """One line of a listing; ``modified`` is in seconds since the epoch, by the store's clock."""

    key: str
    bytes: int
    modified: float


class Bucket(Protocol):
    """An object store below one prefix. Any thread may call it.

    Every method raises BucketFailed if the request failed, with a put or a delete perhaps after it
    was carried out; BucketRefused if it would fail again. Each is bounded in time.
    """

    url: str

    def get(self, key: str, limit: int) -> bytes:
        """Return an object of at most ``limit`` bytes; FileNotFoundError without one, and
        BucketFailed if it is larger."""

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        """Return so many bytes from ``start``; FileNotFoundError without the object."""

    def put(self, key: str, data: bytes) -> None:
        """Write an object, over one that is there."""

    def put_new(self, key: str, data: bytes) -> None:
        """Write an object that is not there; FileExistsError if it is. Callers use :func:`create`,
        which also copes with a lost answer."""

    def upload(self, key: str, chunks: Iterable[memoryview], size: int = 0) -> None:
        """Write a large object, over one that is there. It appears whole or not at all.

        What ``chunks`` raises ends the upload and is raised here. ``size`` is in bytes; 0 stands
        for one that is not known, and is at most 80 GB.
        """

    def listing(self, prefix: str) -> Iterator[list[StoredObject]]:
        """Yield the objects whose keys begin with ``prefix``, which ends with a slash, by their
        keys. Each list is what one request gives."""

    def delete(self, keys: list[str]) -> None:
        """Delete objects; one that is not there is no error."""


def create(store: Bucket, key: str, data: bytes) -> bool:
    """Write an object unless another one is there; return whether it is ours.

    Whatever happened to the answer, the object that is there afterwards decides: so ``data`` must
    tell its writer, by a nonce or the identity of an attempt. Raises BucketFailed if that cannot
    be told; a repeat is safe.
    """
    try:
        store.put_new(key, data)
        return True
    except FileExistsError:
        try:
            return store.get(key, len(data) + _OTHERS_BYTES) == data
        except FileNotFoundError:
            raise BucketFailed(f"{store.url}/{key} was deleted just now") from None
    except BucketFailed:
        try:
            return store.get(key, len(data) + _OTHERS_BYTES) == data
        except FileNotFoundError:
            pass
        raise


_OTHERS_BYTES = 64 * 1024 * 1024
