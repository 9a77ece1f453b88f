"""What is deleted in a bucket: checkpoints that no rule keeps, and what was never sealed."""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import partial
from typing import Final

from elastic_ckpt.checkpoint.bucket.catalog import Listed, is_there, listed, read_seal
from elastic_ckpt.checkpoint.bucket.keys import RUNS, SealKey, aside_of, beat_key, data_of
from elastic_ckpt.checkpoint.bucket.ownership import BucketClaim
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.manifest import MAX_MANIFEST_BYTES
from elastic_ckpt.errors import CheckpointError
from elastic_ckpt.policy.retention import (
    Retention,
    RetentionCandidate,
    RetentionVerdict,
    judge,
)
from elastic_ckpt.util.progress import Advance, ignore

KEPT_AUTOMATIC: Final = 3
"""Newest checkpoints that stay of those that were saved automatically, without a rule."""

ASIDE_SECONDS: Final = 7 * 24 * 3600.0
"""How long, by the store's clock, a checkpoint stays whose seal was taken away."""

SWEEP_SECONDS: Final = 24 * 3600.0
"""Age, by the store's clock, from which what no seal names is taken for given up."""


_AT_ONCE: Final = 1000


def remove(store: Bucket, seals: Sequence[SealKey], advance: Advance = ignore) -> None:
    """Delete checkpoints: the seals first, so that none is ever incomplete. A repeat goes on with
    what an interrupted one left unsealed, once it is old enough for :func:`sweep`.

    Args:
        advance: called with each number of objects that were deleted, for an owner that must beat.
    """
    store.delete([seal.key for seal in seals])
    _remove_data(store, seals, advance)


def _remove_data(store: Bucket, seals: Sequence[SealKey], advance: Advance) -> None:
    for seal in seals:
        for page in store.listing(seal.data):
            store.delete([one.key for one in page])
            advance(len(page))


def prune(claim: BucketClaim, session: str, retention: Retention) -> None:
    """Delete what a rule, or :data:`KEPT_AUTOMATIC` without one, does not keep.

    Raises:
        RunSuperseded: another run owns the bucket.
        BucketFailed: the store failed; a repeat goes on.
    """
    rule = retention or Retention(automatic=KEPT_AUTOMATIC)
    with claim.alone():
        done = judged(claim.store, session, rule, without=claim.taken_back)
        going = [one.seal for one, verdict in done if not verdict.keep and not one.superseded]
        if going:
            claim.check()
            claim.store.delete([seal.key for seal in going])
    _remove_data(claim.store, going, claim.beating(ignore))  # a seal must not wait for so many


def set_aside(claim: BucketClaim, seal: SealKey) -> str:
    """Take a checkpoint's seal away, so that nothing loads it; return where it went, empty if it
    was gone already. Its files stay for :data:`ASIDE_SECONDS`: the seal can be put back by hand.

    Raises:
        RunSuperseded: another run owns the bucket.
        BucketFailed: the store failed; a repeat goes on.
    """
    store = claim.store
    claim.check()
    try:
        store.put(seal.aside, store.get(seal.key, MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        return ""
    with claim.alone():
        others = [one.seal.key for one in listed(store, seal.session) if one.seal.age < seal.age]
        known = sorted({*claim.sealed_before(seal.session, seal.key), *others})  # keys count down
        claim.take_back(seal.session, seal.key, next(filter(partial(is_there, store), known), ""))
        store.delete([seal.key])
    return f"{store.url}/{seal.aside}"


def sweep(claim: BucketClaim, session: str = "") -> int:
    """Delete what was uploaded long ago and never sealed, or whose seal is gone; return how many
    objects. For an owner that is uploading nothing; it beats meanwhile."""
    store, advance = claim.store, claim.beating(ignore)
    beats = {one.key: one.modified for page in store.listing(RUNS) for one in page}
    now = beats.get(beat_key(claim.number), 0.0)  # by the store's clock: it was written just now
    sealed = {one.seal.data for one in listed(store, session)}
    aside = [one for page in store.listing(aside_of(session)) for one in page]
    for one in aside:
        seal = SealKey.parse(session, one.key)
        if seal is not None and now - one.modified < ASIDE_SECONDS:
            sealed.add(seal.data)
    root = data_of(session)
    old = [one.key for one in aside if now - one.modified > ASIDE_SECONDS]
    for page in store.listing(root):
        advance(len(page))
        for one in page:
            attempt = root + one.key[len(root) :].partition("/")[0] + "/"
            if now - one.modified > SWEEP_SECONDS and attempt not in sealed:
                old.append(one.key)
    claim.check()
    for first in range(0, len(old), _AT_ONCE):
        store.delete(old[first : first + _AT_ONCE])
        advance(_AT_ONCE)
    return len(old)


def judged(
    store: Bucket,
    session: str,
    retention: Retention,
    *,
    keep_superseded: int | None = None,
    without: Container[str] = (),
) -> list[tuple[Listed, RetentionVerdict]]:
    """Return a verdict for each checkpoint of a session, newest first.

    Reads manifests only if the rule needs what stands in them.

    Args:
        keep_superseded: number of superseded ones to keep, the newest; None keeps all.
        without: keys that an old listing may show.
    """
    every = [one for one in listed(store, session) if one.seal.key not in without]
    current = [one for one in every if not one.superseded]
    rows = [_candidate(store, one, retention) for one in current]
    found = dict(zip(current, judge(retention, rows), strict=True))
    aside = [one for one in every if one.superseded]
    for number, one in enumerate(aside):
        keep = keep_superseded is None or number < keep_superseded
        why = "superseded" if keep else "as requested"
        found[one] = RetentionVerdict(one.seal.key, keep, why)
    return [(one, found[one]) for one in every]


def _candidate(store: Bucket, one: Listed, retention: Retention) -> RetentionCandidate:
    name, step = one.seal.key, one.seal.step
    if not retention.best and not retention.automatic:
        return RetentionCandidate(name, step)
    try:
        manifest = read_seal(store, one.seal)
    except CheckpointError:
        return RetentionCandidate(name, step, usable=False)
    return RetentionCandidate(name, step, True, manifest.metrics, manifest.automatic)
