"""Whether a store keeps what everything here rests on: that of two creations one fails."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable
from typing import Final

from elastic_ckpt.checkpoint.bucket.failures import BucketFailure, advice
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.errors import BucketFailed, BucketRefused

REQUESTS: Final = 5
"""How many requests a probe makes."""


def probe(store: Bucket, say: Callable[[str], None] = lambda _: None) -> str:
    """Create an object twice, read it, list it and delete it.

    Args:
        say: receives what each of the requests does, before it is made.

    Returns:
        Why nothing can be deleted: then copies are made, and none goes; empty if it can.

    Raises:
        BucketRefused: the bucket is missing, not permitted, or ignores conditions.
        BucketFailed: it does not answer now.
    """
    key = f"probe/{secrets.token_hex(8)}"
    say("creating an object")
    try:
        store.put_new(key, b"first")
    except BucketFailed as error:
        if error.errno == errno.ENOENT:  # a 404 to the very first request: not a gateway's
            raise BucketRefused(str(error)) from None
        raise
    why = ""
    try:
        _try_again(store, key, say)
    finally:
        say("deleting it")
        try:
            store.delete([key])
        except (BucketFailed, BucketRefused) as error:
            why = str(error)
    return why


def _try_again(store: Bucket, key: str, say: Callable[[str], None]) -> None:
    say("creating it again")
    try:
        store.put_new(key, b"second")
    except FileExistsError:
        pass
    else:
        why = BucketFailure.NO_CONDITIONS
        raise BucketRefused(f"cannot use {store.url}: {why.value}; {advice(why)}")
    say("reading it")
    if store.get(key, 64) != b"first":
        raise BucketFailed(f"cannot use {store.url}: it does not return what was written")
    say("listing it")
    if not any(one.key == key for page in store.listing("probe/") for one in page):
        raise BucketFailed(f"cannot use {store.url}: it does not list what was written")
