"""Stores and claims for tests of the bucket tier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import obstore.store

from elastic_ckpt.checkpoint.bucket.object_store import BucketStore
from elastic_ckpt.checkpoint.bucket.ownership import (
    BucketClaim,
    claim_after,
    new_owner,
    newest_claim,
)
from elastic_ckpt.checkpoint.bucket.store import Bucket, StoredObject
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.errors import BucketFailed

URL = BucketUrl.parse("s3://bucket/job")


def memory_store() -> BucketStore:
    """Return an empty store in memory, which keeps conditions."""
    return BucketStore(URL, obstore.store.MemoryStore())


def claim(store: Bucket, run_id: str = "run") -> BucketClaim:
    """BucketClaim a bucket whose earlier owners have gone."""
    return claim_after(store, newest_claim(store), new_owner(run_id, "node"))


class Hooked:
    """A store that counts requests, and asks ``before`` and ``after`` each one with its name and
    key; what they raise is the request's error."""

    def __init__(self, store: Bucket) -> None:
        self._store = store
        self.url = store.url
        self.asked: list[str] = []
        self.before: Callable[[str, str], None] = lambda _name, _key: None
        self.after: Callable[[str, str], None] = lambda _name, _key: None

    def get(self, key: str, limit: int) -> bytes:
        with_answer = self._ask("get", key)
        found = self._store.get(key, limit)
        with_answer()
        return found

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        with_answer = self._ask("get_range", key)
        found = self._store.get_range(key, start, length)
        with_answer()
        return found

    def put(self, key: str, data: bytes) -> None:
        with_answer = self._ask("put", key)
        self._store.put(key, data)
        with_answer()

    def put_new(self, key: str, data: bytes) -> None:
        with_answer = self._ask("put_new", key)
        self._store.put_new(key, data)
        with_answer()

    def upload(self, key: str, chunks: Iterable[memoryview], size: int = 0) -> None:
        with_answer = self._ask("upload", key)
        self._store.upload(key, chunks, size)
        with_answer()

    def listing(self, prefix: str) -> Iterator[list[StoredObject]]:
        for page in self._store.listing(prefix):
            with_answer = self._ask("list", prefix)
            yield page
            with_answer()

    def delete(self, keys: list[str]) -> None:
        with_answer = self._ask("delete", keys[0] if keys else "")
        self._store.delete(keys)
        with_answer()

    def _ask(self, name: str, key: str) -> Callable[[], None]:
        self.asked.append(name)
        self.before(name, key)
        return lambda: self.after(name, key)


def failing(name: str, key: str = "") -> Callable[[str, str], None]:
    """Return a hook that fails requests of this name, of keys that begin so."""

    def fail(asked: str, at: str) -> None:
        if asked == name and at.startswith(key):
            raise BucketFailed(f"cannot {name} {at}")

    return fail
