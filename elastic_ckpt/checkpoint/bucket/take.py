"""How a run takes a bucket over from its previous owner."""

from __future__ import annotations

import contextlib
import shlex
import time
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.bucket.ownership import (
    Claim,
    Owner,
    claim_after,
    identify,
    newest_claim,
    read_beat,
    read_owner,
)
from elastic_ckpt.checkpoint.bucket.store import Store
from elastic_ckpt.checkpoint.ownership.job_lock import Patience
from elastic_ckpt.errors import BucketRefused, LockHeld
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.lease import BUCKET_LEASE_SECONDS, LeaseWatch, Verdict
from elastic_ckpt.util.files import read_bounded, write_atomic

_POLL_SECONDS: Final = 2.0


def take(store: Store, identity: str, owner: Owner, patience: Patience) -> Claim:
    """Own a job's bucket: at once if the previous owner has ended, else after its lease.

    Raises:
        BucketRefused: it holds another job, or it is not permitted.
        LockHeld: the previous owner is alive, or another run was faster.
        StopAborted: a signal came during the wait.
        BucketFailed: the store does not answer.
    """
    identify(store, identity)
    number = newest_owner(store)
    if number:
        _wait(store, number, patience)
    return claim_after(store, number, owner)


def newest_owner(store: Store) -> int:
    """Return the number of the newest owner, 0 without any, although a listing may be old."""
    number = newest_claim(store)
    while read_owner(store, number + 1) is not None:
        number += 1
    return number


def _wait(store: Store, number: int, patience: Patience) -> None:
    previous = read_owner(store, number)
    who = previous.shown if previous else f"claim {number}"
    beat = read_beat(store, number)
    gone = (beat is not None and beat.ended) or (
        previous is not None and previous.owner.is_alive() is False
    )
    watch = LeaseWatch(
        msgspec.json.encode(beat), time.monotonic(), gone=gone, lease=BUCKET_LEASE_SECONDS
    )
    if not gone:
        patience.say(
            f"{who} did not end the job in {store.url} properly: waiting up to "
            f"{BUCKET_LEASE_SECONDS:.0f} s to be sure that it is gone"
        )
    while True:
        verdict = watch.judge(msgspec.json.encode(beat), time.monotonic())
        if verdict is Verdict.TAKE or (beat is not None and beat.ended):
            return
        if verdict is Verdict.REFUSE:
            raise LockHeld(
                f"{store.url} is owned by {who}, which is alive: stop that one first, or choose "
                "another URL"
            )
        patience.check(who)
        time.sleep(_POLL_SECONDS)
        beat = read_beat(store, number)


class _Link(msgspec.Struct, frozen=True):
    url: str
    nonce: str


def note(job: JobDirectory, url: str, owner: Owner) -> None:
    """Note in a directory which owner of a bucket it has continued, or is."""
    write_atomic(_links(job), msgspec.json.encode(_Link(url, owner.nonce)))


def is_in_step(job: JobDirectory, store: Store) -> bool:
    """Return whether a bucket has been continued by nobody but this directory's runs.

    Raises:
        BucketFailed: the store does not answer.
    """
    number = newest_owner(store)
    owner = read_owner(store, number) if number else None
    if owner is None:
        return True
    with contextlib.suppress(OSError, ValueError, msgspec.MsgspecError):
        found = msgspec.json.decode(read_bounded(_links(job), 64 * 1024), type=_Link)
        return found == _Link(store.url, owner.nonce)
    return False


def require_step(job: JobDirectory, store: Store) -> None:
    """Raise BucketRefused unless :func:`is_in_step`: what a directory has would go before what
    another machine has done since."""
    if not is_in_step(job, store):
        raise BucketRefused(
            f"another directory or machine has continued the job in {store.url}: bring that here "
            f"first with elastic-ckpt pull {store.url} {shlex.quote(str(job.root))}, or choose "
            "another URL"
        )


def _links(job: JobDirectory) -> Path:
    return job.control / "bucket.json"
