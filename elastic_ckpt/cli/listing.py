"""``elastic-ckpt list``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Literal

import click

from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.catalog import CheckpointView, list_checkpoints
from elastic_ckpt.cli.common import directory_argument, echo_json, open_job, show_not_begun
from elastic_ckpt.errors import JobNotBegun
from elastic_ckpt.jobdir.node_record import job_records
from elastic_ckpt.util.text import encodable
from elastic_ckpt.util.units import human_bytes, human_duration


@click.command("list")
@directory_argument
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array, newest first.")
def command(directory: Path | BucketUrl, as_json: bool) -> int:
    """List the checkpoints in DIR: verified, intact, sealed or not.

    \b
      elastic-ckpt list ckpt
      elastic-ckpt list ckpt --json | jq -r '.[] | select(.sealed) | .path'

    The newest checkpoint is intact if every file exists with its size. Older ones are sealed if
    their manifest is valid; their files are not looked at here, but by elastic-ckpt verify.
    Verified means that every byte was once read and its digest matched: at a restart, or by
    verify --full. Checkpoints that are still in memory are listed too; on several nodes as a share,
    the part that this node has. Superseded ones come last, by the names that restore takes. DIR may
    be the URL of a bucket.
    """
    if isinstance(directory, BucketUrl):
        from elastic_ckpt.cli.bucket.inspect import list_bucket

        return list_bucket(directory, as_json=as_json)
    try:
        job = open_job(directory)
    except JobNotBegun as error:
        code = show_not_begun(error)
        if as_json:
            echo_json([])
        return code
    record = next(iter(job_records(job)), None)
    views = list_checkpoints(job, record.memory if record else "")
    if as_json:
        echo_json([as_row(view) for view in views])
        return 0
    aside = [view for view in views if view.tier == "superseded"]
    if len(views) > len(aside):
        _print([view for view in views if view.tier != "superseded"])
    else:
        click.echo(f"no checkpoints in {directory}")
    if aside:
        _print_superseded(aside, directory)
    return 0


def as_row(view: CheckpointView) -> dict[str, Any]:
    """Return one checkpoint as ``--json`` prints it: bytes, seconds. ``intact`` is None if its
    files were not looked at; ``sealed`` tells that nothing is known to be wrong."""
    return {
        "path": encodable(str(view.path)),
        "epoch": view.epoch,
        "step": view.step,
        "reason": view.seal.reason if view.seal else None,
        "tier": view.tier,
        "bytes": view.seal.total_bytes if view.seal else None,
        "age_seconds": view.age_seconds,
        "sealed": not view.why,
        "intact": view.intact if view.checked else None,
        "verified": view.verified,
        "why": view.why,
        "session": view.session,
    }


def _print_superseded(views: list[CheckpointView], directory: Path) -> None:
    size = human_bytes(sum(one.manifest.total_bytes for one in views if one.manifest))
    command = f"elastic-ckpt restore {shlex.quote(encodable(str(directory)))} NAME"
    click.echo(f"\n{len(views)} superseded, {size}; {command} goes back to one:")
    for view in views:
        click.echo(f"  {view.shown}  {human_duration(view.age_seconds)} old  {view.why}")


def _print(views: list[CheckpointView]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    named = any(view.session for view in views)
    left = ("session", "reason", "tier")
    for title in (*["session"] * named, "step", "epoch", "reason", "tier", "size", "age"):
        justify: Literal["left", "right"] = "left" if title in left else "right"
        table.add_column(title, justify=justify, overflow="fold")
    table.add_column("state", overflow="fold")
    for view in views:
        is_clear = not (view.is_scripts and view.why) or view.title in view.why
        name = "" if is_clear else f"{view.title}: "
        state = Text(f"{name}{view.state}", "red" if view.why else "green")
        table.add_row(
            *[view.session or "-"] * named,
            str(view.step),
            str(view.epoch),
            view.seal.reason if view.seal else "-",
            view.tier,
            human_bytes(view.seal.total_bytes if view.seal else None),
            human_duration(view.age_seconds),
            state,
        )
    Console().print(table)
