"""``elastic-ckpt logs``."""

from __future__ import annotations

from pathlib import Path

import click

from elastic_ckpt.cli.common import directory_argument, open_job
from elastic_ckpt.errors import UsageError
from elastic_ckpt.store.logs import log_files


@click.command("logs")
@directory_argument
@click.option("--rank", type=click.IntRange(min=0), help="That rank's alone.")
@click.option("--last", is_flag=True, help="The newest incarnation's alone.")
def command(directory: Path, rank: int | None, last: bool) -> int:
    """What the workers of the job in DIR printed, by incarnation.

    \b
      elastic-ckpt logs checkpoints --last
      elastic-ckpt logs checkpoints --rank 3 | less

    The newest 20 incarnations are kept, of each rank 16 to 32 MB.
    """
    job = open_job(directory)
    logs = log_files(job)
    if last and logs:
        newest = logs[-1].incarnation
        logs = [log for log in logs if log.incarnation == newest]
    if rank is not None:
        logs = [log for log in logs if log.rank == rank]
    if not logs:
        raise UsageError(
            f"no worker has printed anything that is kept in {job.logs}"
            + ("" if rank is None else f", or none of rank {rank}")
        )
    for log in logs:
        click.echo(f"== incarnation {log.incarnation}, rank {log.rank}")
        for line in log.lines():
            click.echo(line)
    return 0
