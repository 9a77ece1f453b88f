"""``list``, ``verify`` and ``prune`` of a job in a bucket."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import click

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.catalog import Listed
from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.retain import judged, remove
from elastic_ckpt.checkpoint.bucket.source import in_bucket
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.manifest import Manifest
from elastic_ckpt.cli.bucket.places import shown
from elastic_ckpt.cli.common import echo_json
from elastic_ckpt.cli.progress_bar import progress_bar
from elastic_ckpt.errors import CheckpointError, CheckpointRejected, ExitCode
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.progress import Advance
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import human_bytes, human_duration

_REQUESTS: Final = 16
"""Manifests that are read at once."""


class _Row:
    """A checkpoint in the bucket; ``why`` tells why it is not intact, else it is empty."""

    def __init__(self, store: Bucket, listed: Listed) -> None:
        self.listed = listed
        self.name = shown(listed.seal)
        self.manifest: Manifest | None = None
        self.why = ""
        self.checked = False  # the sizes of its objects
        self.verified = False
        try:
            self.manifest = catalog.read_seal(store, listed.seal)
        except CheckpointError as error:
            self.why = printable(str(error))

    @property
    def state(self) -> str:
        if self.listed.superseded and not self.why:
            return "superseded"
        return self.why or ("verified" if self.verified else "sealed")

    @property
    def bytes(self) -> int | None:
        return self.manifest.total_bytes if self.manifest else None

    def as_json(self, url: BucketUrl) -> dict[str, Any]:
        return {
            "path": f"{url}/{self.listed.seal.key}",
            "epoch": self.listed.seal.epoch,
            "step": self.listed.seal.step,
            "reason": self.manifest.reason if self.manifest else None,
            "tier": "superseded" if self.listed.superseded else "bucket",
            "bytes": self.bytes,
            "age_seconds": _age(self.listed),
            "sealed": not self.why,
            "intact": False if self.why else (True if self.checked else None),
            "verified": self.verified,
            "why": self.why,
            "session": self.listed.seal.session,
        }


def list_bucket(url: BucketUrl, *, as_json: bool) -> int:
    """Print the checkpoints of a bucket, newest first."""
    rows = _rows(open_store(url))
    if as_json:
        echo_json([row.as_json(url) for row in rows])
    elif rows:
        _print(rows)
    else:
        click.echo(f"no checkpoints in {url}")
    return 0


def verify_bucket(url: BucketUrl, *, full: bool, as_json: bool) -> int:
    """Compare the size of every object, or read every byte; 65 if a checkpoint fails."""
    store = open_store(url)
    rows = _rows(store)
    with progress_bar() as watch:
        for row in rows:
            if row.manifest is None:
                continue
            try:
                _check_sizes(store, row, row.manifest)
                row.checked = True
                if full:
                    advance = watch(f"verifying {row.name}", row.manifest.total_bytes)
                    _read_all(store, row, row.manifest, advance)
                    row.verified = True
            except CheckpointError as error:
                row.why = printable(str(error))
    if as_json:
        echo_json([row.as_json(url) for row in rows])
    else:
        _print_verified(rows, full)
    return 0 if rows and not any(row.why for row in rows) else int(ExitCode.DATA)


def prune_bucket(
    url: BucketUrl,
    retention: Retention,
    keep_superseded: int | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Delete the checkpoints of a bucket that no rule keeps."""
    store = open_store(url)
    done = [
        (one, verdict)
        for session in catalog.sessions(store)
        for one, verdict in judged(store, session, retention, keep_superseded=keep_superseded)
    ]
    going = [one.seal for one, verdict in done if not verdict.keep]
    if not dry_run:
        remove(store, going)
    gone = "would go" if dry_run else "deleted"
    if as_json:
        echo_json(
            [
                {"path": f"{url}/{one.seal.key}", "step": one.seal.step, "keep": verdict.keep,
                 "why": verdict.why, "failed": False}
                for one, verdict in done
            ]
        )  # fmt: skip
        return 0
    for one, verdict in done:
        what = "kept" if verdict.keep else gone
        click.echo(f"{what:8}  {shown(one.seal)}  {verdict.why}")
    click.echo(f"{len(going)} of {len(done)} {gone}")
    return 0


def _rows(store: Bucket) -> list[_Row]:
    every = [one for session in catalog.sessions(store) for one in catalog.listed(store, session)]
    with ThreadPoolExecutor(_REQUESTS, "manifest") as pool:
        rows = list(pool.map(lambda one: _Row(store, one), every))
    return sorted(rows, key=lambda row: row.listed.superseded)


def _check_sizes(store: Bucket, row: _Row, manifest: Manifest) -> None:
    prefix = row.listed.seal.data
    there = {one.key: one.bytes for page in store.listing(prefix) for one in page}
    for entry in manifest.files:
        size = there.get(prefix + entry.path)
        if size is None:
            raise CheckpointRejected(f"{entry.path} is missing")
        if size != entry.bytes:
            raise CheckpointRejected(
                f"{entry.path} has {size} bytes, its manifest says {entry.bytes}"
            )


def _read_all(store: Bucket, row: _Row, manifest: Manifest, advance: Advance) -> None:
    with in_bucket(store, row.listed.seal, manifest.files) as source:
        for entry in manifest.files:
            for data in source(entry):
                advance(len(data))


def _age(listed: Listed) -> float:
    return max(0.0, time.time() - listed.modified)


def _print(rows: Sequence[_Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("checkpoint", "reason", "size", "age", "state"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(
            row.name,
            row.manifest.reason if row.manifest else "-",
            human_bytes(row.bytes),
            human_duration(_age(row.listed)),
            Text(row.state, "red" if row.why else "green"),
        )
    Console().print(table)


def _print_verified(rows: Sequence[_Row], full: bool) -> None:
    if not rows:
        click.echo("no checkpoints to verify")
    for row in rows:
        if row.why:
            click.echo(f"{row.name}: FAILED: {row.why}")
        else:
            state = "verified (every byte hashed" if full else "intact (sealed, sizes match"
            click.echo(f"{row.name}: {state}; {human_bytes(row.bytes)})")
