"""``elastic-ckpt prune``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from elastic_ckpt.checkpoint.prune import Pruned, prune
from elastic_ckpt.cli.common import directory_argument, echo_json, open_job
from elastic_ckpt.cli.progress_bar import progress_bar
from elastic_ckpt.cli.run.build_settings import make_retention
from elastic_ckpt.cli.run.options import retention_options
from elastic_ckpt.errors import ExitCode, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.text import encodable
from elastic_ckpt.util.units import human_bytes


@click.command("prune")
@directory_argument
@retention_options
@click.option("--dry-run", is_flag=True, help="Delete nothing; show what would go, and why.")
@click.option("--json", "as_json", is_flag=True, help="An array, newest first.")
def command(
    directory: Path,
    keep_last: int,
    keep_every: int,
    keep_best: str | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Delete the checkpoints in DIR that no rule keeps.

    \b
      elastic-ckpt prune ckpt --keep-last 3 --keep-every 1000 --dry-run
      elastic-ckpt prune ckpt --keep-last 2 --keep-best 3:loss

    Never deleted: the newest verified checkpoint, one that is open, and one that is not intact.
    Safe while the job runs. The rule applies to each named Session by itself.

    Exits with 0, with 73 if something could not be deleted.
    """
    retention = make_retention(keep_last, keep_every, keep_best)
    if not retention:
        raise UsageError("specify what to keep: --keep-last, --keep-every or --keep-best")
    job = open_job(directory)
    with progress_bar() as watch:
        done = [
            one
            for session in job.sessions()
            for one in prune(session, retention, dry_run=dry_run, watch=watch)
        ]
    if as_json:
        echo_json([{**vars(one), "path": encodable(str(one.path))} for one in done])
    else:
        _print(done, dry_run)
    return int(ExitCode.UNAVAILABLE) if any(one.failed for one in done) else 0


def _print(done: Sequence[Pruned], dry_run: bool) -> None:
    gone = "would go" if dry_run else "deleted"
    for one in done:
        what = "kept" if one.keep else gone
        session = JobDirectory.holding(one.path.parent).name
        name = f"{session}/{one.path.name}" if session else one.path.name
        click.echo(f"{what:8}  {name}  {human_bytes(one.bytes)}  {one.why}")
    freed = [one for one in done if not one.keep]
    total = human_bytes(sum(one.bytes for one in freed))
    click.echo(f"{len(freed)} of {len(done)} {gone}, {total}")
