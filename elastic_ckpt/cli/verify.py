"""``elastic-ckpt verify``."""

from __future__ import annotations

import os
from pathlib import Path

import click
import msgspec

from elastic_ckpt.cli.common import directory_argument, open_job
from elastic_ckpt.cli.listing import as_row
from elastic_ckpt.cli.progress_bar import progress_bar
from elastic_ckpt.core.progress import Watch, human_bytes
from elastic_ckpt.core.text import encodable, shown_json
from elastic_ckpt.errors import ExitCode, UsageError
from elastic_ckpt.store.catalog import CheckpointView, scan, view
from elastic_ckpt.store.layout import JobDirectory, checkpoint_key
from elastic_ckpt.store.quarantine import set_aside
from elastic_ckpt.store.verified import mark_verified, unmark
from elastic_ckpt.store.verify import MANIFEST_NAME


@click.command("verify")
@directory_argument
@click.option("--full", is_flag=True, help="Hash every byte instead of comparing sizes.")
@click.option("--json", "as_json", is_flag=True, help="An array, newest first.")
@click.option("--quarantine", is_flag=True, help="Set aside what is sealed and not whole.")
def command(directory: Path, full: bool, as_json: bool, quarantine: bool) -> int:
    """Is every checkpoint in DIR, or the one that DIR is, what was written?

    Exits with 0 if all are, with 65 if one is not or there is none.
    """
    job = open_job(directory)
    named = checkpoint_key(job.root.name) is not None
    # A manifest that somebody put into a job directory must not hide the checkpoints there.
    sealed = os.path.lexists(job.root / MANIFEST_NAME) and not os.path.lexists(job.control)
    single = named or sealed
    if quarantine and single and not named:
        raise UsageError(f"{job.root} is in no job directory: --quarantine has no place for it")
    if single:
        job = JobDirectory(job.root.parent)
    paths = [Path(directory).resolve()] if single else scan(job)
    with progress_bar() as watch:
        views = [_look_at(job, path, full, watch) for path in paths]
    if as_json:
        click.echo(shown_json(msgspec.json.encode([as_row(found) for found in views])))
    else:
        _print(views, full)
    if quarantine:
        for found in views:
            _set_aside(job, found)
    return 0 if views and all(found.valid for found in views) else int(ExitCode.DATA)


def _look_at(job: JobDirectory, path: Path, full: bool, watch: Watch) -> CheckpointView:
    found = view(path)
    if not full or not found.valid or found.manifest is None:
        return found
    found = view(path, watch(f"verifying {path.name}", found.manifest.total_bytes))
    if found.valid and found.manifest is not None:
        mark_verified(job, path, found.manifest)
    elif not found.foreign:
        unmark(job, path)  # it was whole once; retention must not count on it any more
    return found


def _print(views: list[CheckpointView], full: bool) -> None:
    if not views:
        click.echo("no checkpoints to verify")
    for found in views:
        if found.valid and found.manifest is not None:
            how = "every byte hashed" if full else "sealed, sizes match"
            size = human_bytes(found.manifest.total_bytes)
            click.echo(f"{found.path.name}: valid ({how}; {size})")
        else:
            click.echo(f"{found.path.name}: NOT valid: {found.why}")


def _set_aside(job: JobDirectory, found: CheckpointView) -> None:
    if not found.valid and not found.foreign:
        target = set_aside(job, found.path, found.why)
        click.echo(f"{found.path.name}: set aside as {encodable(str(target))}", err=True)
