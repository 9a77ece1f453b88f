"""Reads who leads a job: from its directory, or from its bucket."""

from __future__ import annotations

from elastic_ckpt.checkpoint.bucket.ownership import read_beat as read_bucket_beat
from elastic_ckpt.checkpoint.bucket.ownership import read_owner
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.bucket.take import newest_owner
from elastic_ckpt.checkpoint.ownership.fence import newest_number, read_beat, read_run
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.protocol.succession import Leader


def leader_of(job: JobDirectory) -> Leader | None:
    """Return the newest run of a directory; None before the first, or if its record is torn.

    Raises:
        OSError: the storage does not answer.
    """
    number = newest_number(job)
    found = read_run(job, number) if number else None
    if found is None:
        return None
    beat = read_beat(job, number)
    return Leader(number, found.node, found.endpoint, beat, found.ended, found.passed_on)


def leader_in(store: Bucket) -> Leader | None:
    """Return the newest run of a bucket; None before the first.

    Raises:
        BucketFailed, BucketRefused: the store does not answer, or holds something else.
    """
    number = newest_owner(store)
    found = read_owner(store, number) if number else None
    if found is None:
        return None
    beat = read_bucket_beat(store, number)
    if beat is None:
        return Leader(number, found.node, found.endpoint)
    shown = f"{beat.nonce} {beat.count}".encode()
    return Leader(number, found.node, found.endpoint, shown, beat.ended, beat.passed_on)
