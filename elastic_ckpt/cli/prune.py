"""``elastic-ckpt prune``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.memory.leftover import remove_leftover
from elastic_ckpt.checkpoint.own.seal import seals
from elastic_ckpt.checkpoint.prune import Pruned, prune
from elastic_ckpt.cli.common import directory_argument, echo_json, open_job
from elastic_ckpt.cli.progress.progress_bar import progress_bar
from elastic_ckpt.cli.run.build_settings import make_retention
from elastic_ckpt.cli.run.options import retention_options
from elastic_ckpt.errors import ExitCode, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.text import encodable, printable
from elastic_ckpt.util.units import human_bytes


@click.command("prune")
@directory_argument
@retention_options
@click.option(
    "--keep-superseded",
    metavar="N",
    type=click.IntRange(min=0),
    help="Keep the N superseded lines that were set aside last; 0 deletes all. Default: all.",
)
@click.option("--memory", is_flag=True, help="DIR is a tier that doctor lists: delete all of it.")
@click.option("--dry-run", is_flag=True, help="Delete nothing; show what would go, and why.")
@click.option("--json", "as_json", is_flag=True, help="An array, newest first.")
def command(
    directory: Path | BucketUrl,
    keep_last: int,
    keep_every: int,
    keep_best: str | None,
    keep_superseded: int | None,
    memory: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Delete the checkpoints in DIR that no rule keeps.

    \b
      elastic-ckpt prune ckpt --keep-last 3 --keep-every 1000 --dry-run
      elastic-ckpt prune ckpt --keep-last 2 --keep-best 3:loss
      elastic-ckpt prune ckpt --keep-superseded 1
      elastic-ckpt prune --memory /dev/shm/elastic-ckpt-0-3f9c52d81b07e6a4

    Never deleted: the newest verified checkpoint, one that is open, and one that is not intact.
    Safe while the job runs. The rule applies by itself to each named Session, and to each line of
    superseded checkpoints, those that were set aside together. The newest of a line goes only with
    --keep-superseded.

    What is in memory and not on the disk is deleted only by --memory: it cannot be brought back.
    status and doctor list it, with the command.

    DIR may be the URL of a bucket, where superseded checkpoints count one by one.

    Exits with 0, with 73 if something could not be deleted or is in use.
    """
    retention = make_retention(keep_last, keep_every, keep_best)
    if memory:
        if isinstance(directory, BucketUrl):
            raise UsageError("--memory deletes a tier in this machine's memory: pass its path")
        if retention or keep_superseded is not None:
            raise UsageError("--memory deletes the whole tier: leave the --keep options out")
        return _delete_tier(directory, dry_run=dry_run, as_json=as_json)
    if not retention and keep_superseded is None:
        raise UsageError(
            "specify what to keep: --keep-last, --keep-every, --keep-best or --keep-superseded"
        )
    if isinstance(directory, BucketUrl):
        from elastic_ckpt.cli.bucket.inspect import prune_bucket

        return prune_bucket(directory, retention, keep_superseded, dry_run=dry_run, as_json=as_json)
    job = open_job(directory)
    with progress_bar() as watch:
        done = [
            one
            for session in job.sessions()
            for one in prune(
                session, retention, dry_run=dry_run, watch=watch, superseded=keep_superseded
            )
        ]
    if as_json:
        echo_json([{**vars(one), "path": encodable(str(one.path))} for one in done])
    else:
        _print(done, dry_run)
        if retention and (own := sum(not one.copied for one in seals(job))):
            click.echo(
                f"{own} of the script's own were left alone: elastic-ckpt run --keep-last deletes "
                "these"
            )
    return int(ExitCode.UNAVAILABLE) if any(one.failed for one in done) else 0


def _delete_tier(tier: Path, *, dry_run: bool, as_json: bool) -> int:
    gone = remove_leftover(tier.absolute(), dry_run=dry_run)
    if as_json:
        job = encodable(gone.job)
        echo_json([{"path": str(gone.tier), "job": job, "step": gone.step, "bytes": gone.bytes}])
        return 0
    what = "nothing that its disk lacks" if gone.step is None else f"step {gone.step}"
    whose = printable(gone.job) or "an unknown job"
    done = "would go" if dry_run else "deleted"
    click.echo(f"{done:8}  {gone.tier}  {human_bytes(gone.bytes)}  {what} of {whose}")
    return 0


def _print(done: Sequence[Pruned], dry_run: bool) -> None:
    gone = "would go" if dry_run else "deleted"
    for one in done:
        what = "kept" if one.keep else gone
        name = JobDirectory.holding(one.path.parent).shown(one.path)
        click.echo(f"{what:8}  {name}  {human_bytes(one.bytes)}  {one.why}")
    freed = [one for one in done if not one.keep]
    total = human_bytes(sum(one.bytes for one in freed))
    aside = [one for one in done if one.path.parent.name == ".superseded"]
    kept = [one for one in aside if one.keep]
    size = human_bytes(sum(one.bytes for one in kept))
    also = f"; kept {len(kept)} of {len(aside)} superseded, {size}" if aside else ""
    click.echo(f"{len(freed)} of {len(done)} {gone}, {total}{also}")
