"""``elastic-ckpt verify``."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

import click

from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.catalog import CheckpointView, own_views, scan, view
from elastic_ckpt.checkpoint.own.seal import verify as verify_own
from elastic_ckpt.checkpoint.quarantine import set_aside
from elastic_ckpt.checkpoint.verify import MANIFEST_NAME, mark_verified, unmark
from elastic_ckpt.cli.common import directory_argument, echo_json, open_job
from elastic_ckpt.cli.listing import as_row
from elastic_ckpt.cli.progress.progress_bar import progress_bar
from elastic_ckpt.errors import CheckpointError, ExitCode, UsageError
from elastic_ckpt.jobdir.node_record import node_name
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key
from elastic_ckpt.journal.events import CheckpointVerified, JournalEvent, Quarantined
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.util.progress import Watch
from elastic_ckpt.util.text import encodable, printable
from elastic_ckpt.util.units import human_bytes


@click.command("verify")
@directory_argument
@click.option("--full", is_flag=True, help="Read and hash every byte; else compare sizes.")
@click.option("--json", "as_json", is_flag=True, help="An array, newest first.")
@click.option("--quarantine", is_flag=True, help="Set aside sealed checkpoints that fail.")
def command(directory: Path | BucketUrl, full: bool, as_json: bool, quarantine: bool) -> int:
    """Check the size, or every byte, of every checkpoint in DIR.

    \b
      elastic-ckpt verify ckpt
      elastic-ckpt verify ckpt/epoch-0_step-120 --full
      elastic-ckpt verify ckpt --full --quarantine

    Intact: every file exists with its size. Verified: every byte was read and its digest
    matches. DIR may be one checkpoint, or the URL of a bucket. Safe while the job runs.

    Exits with 0 if all pass, with 65 if one fails or there is none.
    """
    if isinstance(directory, BucketUrl):
        if quarantine:
            raise UsageError("--quarantine is for a directory: elastic-ckpt prune takes a URL")
        from elastic_ckpt.cli.bucket.inspect import verify_bucket

        return verify_bucket(directory, full=full, as_json=as_json)
    job = open_job(directory)
    named = checkpoint_key(job.root.name) is not None
    # A manifest in a job directory must not hide the checkpoints there.
    sealed = os.path.lexists(job.root / MANIFEST_NAME) and not os.path.lexists(job.control)
    single = named or sealed
    if quarantine and single and not named:
        raise UsageError(
            f"{job.root} is in no job directory, where --quarantine could put it: leave that out"
        )
    if single:
        job = JobDirectory.holding(job.root.parent)
    paths = [path for one in job.sessions() for path in scan(one)] if not single else []
    paths += [Path(directory).resolve()] if single else []
    with progress_bar() as watch:
        views = [_look_at(path, full, watch) for path in paths]
        views += [_look_at_own(job, one, full, watch) for one in ([] if single else own_views(job))]
    if as_json:
        echo_json([as_row(found) for found in views])
    else:
        _print(views, full)
    if quarantine:
        for found in views:
            _set_aside(found)
    return 0 if views and all(found.intact for found in views) else int(ExitCode.DATA)


def _look_at(path: Path, full: bool, watch: Watch) -> CheckpointView:
    job, found = JobDirectory.holding(path.parent), view(path)
    if not full or not found.intact or found.manifest is None:
        return found
    began = time.monotonic()
    found = view(path, watch(f"verifying {path.name}", found.manifest.total_bytes))
    seconds = time.monotonic() - began
    event = CheckpointVerified(
        path=str(path), intact=found.intact, why=found.why, how="every byte", seconds=seconds
    )
    _tell(job, event)
    if found.intact and found.manifest is not None:
        mark_verified(job, path, found.manifest)
    elif not found.foreign:
        unmark(job, path)  # retention must no longer count on it
    return found


def _look_at_own(
    job: JobDirectory, found: CheckpointView, full: bool, watch: Watch
) -> CheckpointView:
    """Verify one that the script wrote itself, in full if wanted."""
    if not full or not found.intact or found.own is None:
        return found
    root = found.path.parent if found.own.is_file else found.path
    began, why = time.monotonic(), ""
    try:
        verify_own(found.own, watch(f"verifying {found.path.name}", found.own.total_bytes), root)
    except (CheckpointError, OSError) as error:
        why = printable(str(error))
    seconds = time.monotonic() - began
    _tell(
        job,
        CheckpointVerified(
            path=str(found.path), intact=not why, why=why, how="every byte", seconds=seconds
        ),
    )
    return replace(found, intact=not why, verified=not why, why=why)


def _tell(job: JobDirectory, event: JournalEvent) -> None:
    """Journal it, if the job is this user's: a file of another one's would be in its way."""
    with contextlib.suppress(OSError):
        if job.root.stat().st_uid == os.geteuid():
            Journal(job, node_name()).write(event)


def _print(views: list[CheckpointView], full: bool) -> None:
    if not views:
        click.echo("no checkpoints to verify")
    for found in views:
        if found.intact and found.seal is not None:
            state = "verified (every byte hashed" if full else "intact (sealed, sizes match"
            size = human_bytes(found.seal.total_bytes)
            click.echo(f"{found.shown}: {state}; {size})")
        else:
            click.echo(f"{found.shown}: FAILED: {found.why}")


def _set_aside(found: CheckpointView) -> None:
    if not found.intact and not found.foreign and found.own is None:
        click.echo(f"{found.shown}: set aside as {move_aside(found)}", err=True)


def move_aside(found: CheckpointView) -> str:
    """Move a damaged checkpoint to quarantine, and journal it; return where it is."""
    job = JobDirectory.holding(found.path.parent)
    target = set_aside(job, found.path, found.why)
    _tell(job, Quarantined(path=str(found.path), to=str(target), reason=found.why))
    return encodable(str(target))
