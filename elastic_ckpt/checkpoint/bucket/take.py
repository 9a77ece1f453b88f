"""How a run takes a bucket over from its previous owner."""

from __future__ import annotations

import contextlib
import shlex
import time
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.bucket.ownership import (
    KEPT_CLAIMS,
    BucketClaim,
    Owner,
    claim_after,
    identify,
    newest_claim,
    read_beat,
    read_owner,
    read_told,
)
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.ownership.job_lock import Patience
from elastic_ckpt.errors import BucketRefused, LockHeld
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.lease import BUCKET_LEASE_SECONDS, LeaseWatch, Verdict
from elastic_ckpt.util.files import read_bounded, write_atomic

_POLL_SECONDS: Final = 2.0


def take(store: Bucket, identity: str, owner: Owner, patience: Patience) -> BucketClaim:
    """Own a job's bucket: at once if the previous owner has ended, else after its lease.

    Raises:
        BucketRefused: it holds another job, or it is not permitted.
        LockHeld: the previous owner is alive, or another run was faster.
        StopAborted: a signal came during the wait.
        BucketFailed: the store does not answer.
    """
    identify(store, identity)
    number = newest_owner(store)
    last = read_owner(store, number) if number else None
    if last is not None and last.nonce == owner.nonce:
        number -= 1  # an earlier try got as far as that
    elif number:
        _wait(store, number, patience)
    return claim_after(store, number, owner)


def newest_owner(store: Bucket) -> int:
    """Return the number of the newest owner, 0 without any, although a listing may be old."""
    number = newest_claim(store)
    while read_owner(store, number + 1) is not None:
        number += 1
    return number


def _wait(store: Bucket, number: int, patience: Patience) -> None:
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
    """What a directory knows of its bucket.

    Attributes:
        own: nonces of its own owners: all that these have sealed came from here.
        pending: nonces of those since that may have claimed, and have sealed nothing.
        owner, newest: of another one, what it had sealed when that was brought here.
    """

    url: str
    own: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()
    owner: str = ""
    newest: dict[str, str] = {}


def take_for(job: JobDirectory, store: Bucket, owner: Owner, patience: Patience) -> BucketClaim:
    """:func:`take` for a directory, which then decides by :func:`was_in_step` whether it may seal,
    and :func:`note_own` if so. A kill anywhere in between leaves it as in step as it was."""
    note_pending(job, store, owner)
    return take(store, job.identity(), owner, patience)


def note_pending(job: JobDirectory, store: Bucket, owner: Owner) -> None:
    """Note that an owner may claim the bucket from here; before it does."""
    before = _read_link(job, store.url)
    pending = (*before.pending[1 - KEPT_CLAIMS :], owner.nonce)
    _write_link(job, msgspec.structs.replace(before, pending=pending))


def note_own(job: JobDirectory, claim: BucketClaim) -> None:
    """Note that a directory has all that is in its bucket, and that an owner seals from it now."""
    before = _read_link(job, claim.store.url)
    own = (*before.own[-3:], claim.owner.nonce)
    _write_link(job, msgspec.structs.replace(before, own=own, pending=()))


def last_seen(store: Bucket) -> tuple[str, dict[str, str]]:
    """Return the newest owner's nonce and its newest seals, for :func:`note_pulled`."""
    number = newest_owner(store)
    owner = read_owner(store, number)
    return owner.nonce if owner else "", read_told(store, number) or {}


def note_pulled(job: JobDirectory, url: str, seen: tuple[str, dict[str, str]]) -> None:
    """Note that this directory has the newest checkpoints of a bucket, once it has them.

    Args:
        seen: as :func:`last_seen` returned it before: the owner there may have gone on.
    """
    owner, newest = seen
    _write_link(job, msgspec.structs.replace(_read_link(job, url), owner=owner, newest=newest))


def is_in_step(job: JobDirectory, store: Bucket) -> bool:
    """Return whether a directory has all that was sealed in a bucket, or put it there.

    Raises:
        BucketFailed: the store does not answer.
    """
    return _has_followed(job, store, newest_owner(store))


def was_in_step(job: JobDirectory, claim: BucketClaim) -> bool:
    """The same, but for this claim, before which the last owner may have gone on sealing."""
    return _has_followed(job, claim.store, claim.number - 1)


def _has_followed(job: JobDirectory, store: Bucket, number: int) -> bool:
    link = _read_link(job, store.url)
    while number:
        owner = read_owner(store, number)
        if owner is None:
            return False
        if owner.nonce in link.own:
            return True
        if (owner.nonce, read_told(store, number) or {}) == (link.owner, link.newest):
            return True
        if owner.nonce not in link.pending:
            return False
        number -= 1  # a try from here that was cut off
    return True


def _read_link(job: JobDirectory, url: str) -> _Link:
    with contextlib.suppress(OSError, ValueError, msgspec.MsgspecError):
        found = msgspec.json.decode(read_bounded(_link(job), 64 * 1024), type=_Link)
        if found.url == url:
            return found
    return _Link(url)


def _write_link(job: JobDirectory, link: _Link) -> None:
    write_atomic(_link(job), msgspec.json.encode(link))


def require_step(job: JobDirectory, store: Bucket, claim: BucketClaim | None = None) -> None:
    """Raise BucketRefused unless :func:`is_in_step`, or :func:`was_in_step` at a claim: what a
    directory has would go before what another machine has done since."""
    if not (was_in_step(job, claim) if claim else is_in_step(job, store)):
        raise BucketRefused(
            f"another directory or machine has continued the job in {store.url}: bring that here "
            f"first with elastic-ckpt pull {store.url} {shlex.quote(str(job.root))}, or choose "
            "another URL"
        )


def _link(job: JobDirectory) -> Path:
    return job.control / "bucket.json"
