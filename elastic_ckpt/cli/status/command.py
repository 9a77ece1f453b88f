"""``elastic-ckpt status``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.common import directory_argument, echo_json, open_job
from elastic_ckpt.cli.status.view import gather
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.paths import JobDirectory

_WATCH_SECONDS = 1.0


@click.command("status")
@directory_argument
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--watch", is_flag=True, help="Refresh every second, until Ctrl-C.")
def command(directory: Path | BucketUrl, as_json: bool, watch: bool) -> int:
    """Show the health of the job in DIR, and what to do.

    \b
      elastic-ckpt status checkpoints
      elastic-ckpt status checkpoints --watch
      elastic-ckpt status checkpoints --json | jq .newest_intact.step
      elastic-ckpt status 4711

    DIR may be the number of a SLURM job, or the URL of a bucket. This works even if the supervisor
    is dead.

    Exits with 0 if it is healthy or finished, 1 if it is degraded, or preempted and waiting to be
    restarted, 2 if it is dead.
    """
    if as_json and watch:
        raise UsageError("--json prints once and --watch repeats: choose one")
    if isinstance(directory, BucketUrl):
        if watch:
            raise UsageError("--watch is for a directory: a bucket is asked once")
        from elastic_ckpt.cli.bucket.status import status_bucket

        return status_bucket(directory, as_json=as_json)
    job = open_job(directory)
    if watch:
        return _watch(job)
    view = gather(job)
    if as_json:
        echo_json(view)
    else:
        from elastic_ckpt.cli.status.page import make_console, show

        show(view, make_console())
    return view.exit_code


def _watch(job: JobDirectory) -> int:
    """Refresh until Ctrl-C; return the exit code of the last page."""
    from rich.live import Live

    from elastic_ckpt.cli.status.page import make_console, page

    console, view = make_console(), gather(job)
    try:
        with Live(page(view, console.width), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(_WATCH_SECONDS)
                view = gather(job)
                live.update(page(view, console.width), refresh=True)
    except KeyboardInterrupt:
        return view.exit_code
