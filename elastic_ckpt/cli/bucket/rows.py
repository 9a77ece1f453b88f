"""The checkpoints in a bucket as ``list``, ``verify`` and ``report`` show them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.catalog import Listed
from elastic_ckpt.checkpoint.bucket.keys import data_of
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.manifest import Manifest
from elastic_ckpt.cli.bucket.places import shown
from elastic_ckpt.errors import CheckpointError, CheckpointRejected
from elastic_ckpt.util.text import printable

_REQUESTS: Final = 16
"""Manifests that are read at once."""


class BucketRow:
    """A checkpoint in the bucket; ``why`` tells why it is not intact, else it is empty."""

    def __init__(self, store: Bucket, listed: Listed) -> None:
        self.listed = listed
        self.name = shown(listed.seal)
        self.manifest: Manifest | None = None
        self.why = ""
        self.verified = False
        try:
            self.manifest = catalog.read_seal(store, listed.seal)
        except CheckpointError as error:
            self.why = printable(str(error))

    @property
    def state(self) -> str:
        """For people: what is known of it."""
        if self.listed.superseded and not self.why:
            return "superseded"
        return self.why or ("verified" if self.verified else "intact")

    @property
    def age_seconds(self) -> float:
        """Since it was sealed, as far as this machine's clock and the store's agree."""
        return max(0.0, time.time() - self.listed.modified)

    @property
    def bytes(self) -> int | None:
        """Of all its files; None if its manifest cannot be trusted."""
        return self.manifest.total_bytes if self.manifest else None

    def as_json(self, url: BucketUrl) -> dict[str, Any]:
        """Return what ``--json`` prints of it."""
        return {
            "path": f"{url}/{self.listed.seal.key}",
            "epoch": self.listed.seal.epoch,
            "step": self.listed.seal.step,
            "reason": self.manifest.reason if self.manifest else None,
            "tier": "superseded" if self.listed.superseded else "bucket",
            "bytes": self.bytes,
            "age_seconds": self.age_seconds,
            "sealed": not self.why,
            "intact": not self.why,
            "verified": self.verified,
            "why": self.why,
            "session": self.listed.seal.session,
        }


def rows_of(store: Bucket) -> list[BucketRow]:
    """Return every checkpoint, newest first, those that are superseded last. Sizes are compared:
    that takes a request for each manifest, and for each thousand objects."""
    found: list[BucketRow] = []
    for session in catalog.sessions(store):
        every = list(catalog.listed(store, session))
        with ThreadPoolExecutor(_REQUESTS, "manifest") as pool:
            rows = list(pool.map(lambda one: BucketRow(store, one), every))
        found += _compared(store, session, rows)
    return sorted(found, key=lambda row: row.listed.superseded)


def _compared(store: Bucket, session: str, rows: Sequence[BucketRow]) -> list[BucketRow]:
    """Say which rows lack a file; leave those out that were deleted meanwhile."""
    expected = {
        row.listed.seal.data: {entry.path: entry.bytes for entry in row.manifest.files}
        for row in rows
        if row.manifest is not None
    }
    sizes: dict[str, str] = {}
    root = data_of(session)
    for page in store.listing(root) if expected else ():
        for one in page:
            attempt, _, path = one.key[len(root) :].partition("/")
            files = expected.get(f"{root}{attempt}/", {})
            size = files.pop(path, one.bytes)
            if size != one.bytes:
                sizes[f"{root}{attempt}/"] = (
                    f"{path} has {one.bytes} bytes, its manifest says {size}"
                )
    kept = []
    for row in rows:
        missing = next(iter(expected.get(row.listed.seal.data, ())), None)
        why = sizes.get(row.listed.seal.data, f"{missing} is missing" if missing else "")
        if why:
            try:
                catalog.read_seal(store, row.listed.seal)
            except CheckpointRejected:
                continue
            row.why = printable(why)
        kept.append(row)
    return kept
