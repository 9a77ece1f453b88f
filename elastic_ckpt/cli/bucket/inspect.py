"""``list``, ``verify`` and ``prune`` of a job in a bucket."""

from __future__ import annotations

from collections.abc import Sequence

import click

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.retain import judged, remove
from elastic_ckpt.checkpoint.bucket.source import in_bucket
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.manifest import Manifest
from elastic_ckpt.cli.bucket.places import shown
from elastic_ckpt.cli.bucket.rows import BucketRow, rows_of
from elastic_ckpt.cli.common import echo_json
from elastic_ckpt.cli.progress.progress_bar import progress_bar
from elastic_ckpt.errors import CheckpointError, ExitCode
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.progress import Advance
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import human_bytes, human_duration


def list_bucket(url: BucketUrl, *, as_json: bool) -> int:
    """Print the checkpoints of a bucket, newest first."""
    rows = rows_of(open_store(url))
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
    rows = rows_of(store)
    with progress_bar() as watch:
        for row in rows if full else ():
            if row.manifest is None or row.why:
                continue
            try:
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


def _read_all(store: Bucket, row: BucketRow, manifest: Manifest, advance: Advance) -> None:
    with in_bucket(store, row.listed.seal, manifest.files) as source:
        for entry in manifest.files:
            for data in source(entry):
                advance(len(data))


def _print(rows: Sequence[BucketRow]) -> None:
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
            human_duration(row.age_seconds),
            Text(row.state, "red" if row.why else "green"),
        )
    Console().print(table)


def _print_verified(rows: Sequence[BucketRow], full: bool) -> None:
    if not rows:
        click.echo("no checkpoints to verify")
    for row in rows:
        if row.why:
            click.echo(f"{row.name}: FAILED: {row.why}")
        else:
            state = "verified (every byte hashed" if full else "intact (sealed, sizes match"
            click.echo(f"{row.name}: {state}; {human_bytes(row.bytes)})")
