"""``elastic-ckpt logs``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.common import directory_argument, open_job
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.worker_logs import log_files, rank_files
from elastic_ckpt.util.text import printable

if TYPE_CHECKING:
    from elastic_ckpt.jobdir.process_log import LogLine


@click.command("logs")
@directory_argument
@click.option("--rank", metavar="RANK", type=click.IntRange(min=0), help="Only this rank.")
@click.option("--last", is_flag=True, help="Only the newest incarnation.")
@click.option(
    "--processes",
    is_flag=True,
    help="The log of elastic-ckpt's own processes by time: supervisors, agents, workers.",
)
def command(directory: Path | BucketUrl, rank: int | None, last: bool, processes: bool) -> int:
    """Print the workers' output of the job in DIR, by incarnation.

    \b
      elastic-ckpt logs checkpoints --last
      elastic-ckpt logs checkpoints --rank 3 | less
      elastic-ckpt logs checkpoints --processes --last
      elastic-ckpt logs s3://bucket/job

    Kept are the newest 20 incarnations, with 16 to 32 MB of each rank, and 4 to 8 MB of each
    process's log. In a bucket there is the end of what the ranks of the newest incarnation
    printed, up to 1 MiB each.

    Exits with 0, or with 64 if there is no output.
    """
    if isinstance(directory, BucketUrl):
        from elastic_ckpt.cli.bucket.history import bucket_logs

        lines = bucket_logs(directory, rank, processes=processes)
    else:
        job = open_job(directory)
        lines = _processes(job, rank, last) if processes else _printed(job, rank, last)
    for line in lines:
        click.echo(line)
    return 0


def _printed(job: JobDirectory, rank: int | None, last: bool) -> Iterator[str]:
    logs = log_files(job)
    newest = max((found[0] for found in rank_files(job, "")), default=0)
    if last:
        logs = [log for log in logs if log.incarnation == newest]
    if rank is not None:
        logs = [log for log in logs if log.rank == rank]
    if not logs:
        raise UsageError(
            "no worker output"
            + (f" of incarnation {newest}" if last and newest else "")
            + ("" if rank is None else f" of rank {rank}")
            + f" in {job.logs}: see elastic-ckpt status"
        )
    for log in logs:
        yield f"== incarnation {log.incarnation}, rank {log.rank}"
        yield from log.lines()


def _processes(job: JobDirectory, rank: int | None, last: bool) -> Iterator[str]:
    from elastic_ckpt.jobdir.process_log import read_process_logs

    lines = read_process_logs(job)
    if last:
        newest = max((line.incarnation or 0 for line in lines), default=0)
        lines = [line for line in lines if (line.incarnation or 0) == newest]
    if rank is not None:
        lines = [line for line in lines if line.rank == rank]
    if not lines:
        raise UsageError(
            "no process log" + ("" if rank is None else f" of rank {rank}") + f" in {job.logs}"
        )
    yield from _shown(lines)


def _shown(lines: Iterable[LogLine]) -> Iterator[str]:
    """Yield ``03:12:44.120  rank 1  step 240  message``, under a heading for each day."""
    lines = list(lines)
    multi_node = len({line.node for line in lines}) > 1
    day = ""
    for line in lines:
        date, _, clock = line.time.rstrip("Z").partition("T")
        if date != day:
            day = date
            yield f"== {day}, UTC"
        level = "" if line.level == "INFO" else f"{printable(line.level, 20).lower()}: "
        yield f"{clock}  {_who(line, multi_node):<18}  {level}{printable(line.message, 4000)}"
        for row in line.error.splitlines():
            yield f"{'':34}{printable(row)}"


def _who(line: LogLine, multi_node: bool) -> str:
    if line.process == "worker" and line.rank is not None:
        return f"rank {line.rank}" + ("" if line.step is None else f"  step {line.step}")
    return printable(f"{line.process} {line.node}" if multi_node else line.process, 100)
