"""``elastic-ckpt status``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from pathlib import Path

import click
import msgspec

from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.common import directory_argument, echo_json, open_job, slurm_number
from elastic_ckpt.cli.status.view import AskSlurm, StatusView, gather
from elastic_ckpt.errors import DirectoryUnusable, JobNotBegun, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answer
from elastic_ckpt.util.units import human_duration

_WATCH_SECONDS = 1.0

_SLURM_SECONDS = 10.0
"""Between two looks that ask SLURM, whose controller is everybody's."""

_SILENT_SECONDS = 3.0
"""How long a look may take before the page says that the directory does not answer."""


@click.command("status")
@directory_argument
@click.option("-v", "--verbose", is_flag=True, help="Show everything: saves, goodput, ranks.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--watch", is_flag=True, help="Refresh every second, until Ctrl-C.")
def command(directory: Path | BucketUrl, verbose: bool, as_json: bool, watch: bool) -> int:
    """Show the health of the job in DIR, and what to do.

    What is wrong comes first (!), with the command that helps; a healthy job takes six lines.

    \b
      elastic-ckpt status checkpoints
      elastic-ckpt status checkpoints -v
      elastic-ckpt status checkpoints --watch
      elastic-ckpt status checkpoints --json | jq .newest_intact.step
      elastic-ckpt status 4711

    DIR may be the number of a SLURM job, or the URL of a bucket. This works even if the supervisor
    is dead.

    Exits with 0 if it is healthy, finished or queued in SLURM, 1 if it is degraded, or preempted
    and waiting to be restarted, 2 if it is dead.
    """
    if as_json and watch:
        raise UsageError("--json prints once and --watch repeats: choose one")
    if isinstance(directory, BucketUrl):
        if watch:
            raise UsageError("--watch is for a directory: a bucket is asked once")
        from elastic_ckpt.cli.bucket.status import status_bucket

        return status_bucket(directory, as_json=as_json)
    job = _open(directory)
    if watch:
        return _watch(job, slurm_number(), verbose=verbose)
    view = gather(job, ask_slurm=_asking(job, slurm_number()))
    if as_json:
        echo_json(view)
    else:
        from elastic_ckpt.cli.status.page import make_console, show

        show(view, make_console(), verbose=verbose)
    return view.exit_code


def _open(directory: Path) -> JobDirectory:
    """Return the directory; it need not exist yet if it is a SLURM job's."""
    try:
        return open_job(directory)
    except JobNotBegun:
        return JobDirectory.at(directory)


def _asking(job: JobDirectory, number: str) -> AskSlurm:
    """Return what asks SLURM: about the job that the user named, else about the last one."""
    from elastic_ckpt.cli.slurm.queue import ask_slurm

    return lambda last: ask_slurm(job.root, number or last)


def _watch(job: JobDirectory, number: str, *, verbose: bool) -> int:
    """Refresh until Ctrl-C; return the exit code of the last page."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from elastic_ckpt.cli.status.page import make_console, page

    console = make_console()
    view: StatusView | None = None
    with Live(console=console, auto_refresh=False) as live:

        def still_waits(seconds: float) -> None:
            if seconds >= _SILENT_SECONDS:
                silence = f"no answer for {human_duration(seconds)} from {job.root}"
                line = Text(f"{silence}: its storage or mount hangs", style="yellow")
                shown = [page(view, console.width, verbose=verbose)] if view is not None else []
                live.update(Group(*shown, line), refresh=True)

        try:
            while True:
                view = _look(job, number, still_waits)
                live.update(page(view, console.width, verbose=verbose), refresh=True)
                time.sleep(_WATCH_SECONDS if view.slurm is None else _SLURM_SECONDS)
        except KeyboardInterrupt:
            if view is None:
                raise
            return view.exit_code


def _look(job: JobDirectory, number: str, still_waits: Callable[[float], None]) -> StatusView:
    """Gather in a child, as a call to storage that does not answer cannot be interrupted."""

    def look() -> Generator[bytes, None, None]:
        view = gather(job, ask_slurm=_asking(job, number))
        yield msgspec.msgpack.encode(view)  # JSON has no NaN, which a metric may be

    try:
        found = answer(look, bytes, math.inf, still_waits)
    except (WorkFailed, NoAnswer) as error:
        raise DirectoryUnusable(f"cannot look at {job.root}: {error}; rerun the command") from None
    return msgspec.msgpack.decode(found, type=StatusView)
