"""``elastic-ckpt logs``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.common import directory_argument, open_job, show_not_begun
from elastic_ckpt.cli.status.nodes import shown_record
from elastic_ckpt.cli.status.problems import is_silent
from elastic_ckpt.errors import JobNotBegun, UsageError
from elastic_ckpt.jobdir.heartbeat import read_heartbeat
from elastic_ckpt.jobdir.node_record import job_records
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import command_line
from elastic_ckpt.jobdir.worker_logs import log_files, rank_files
from elastic_ckpt.protocol.run_state import TERMINAL
from elastic_ckpt.util.text import printable

if TYPE_CHECKING:
    from elastic_ckpt.jobdir.process_log import LogLine

_NAMED: Final = 8  # ranks in a message


@click.command("logs")
@directory_argument
@click.option(
    "--rank",
    "ranks",
    metavar="RANK",
    type=click.IntRange(min=0),
    multiple=True,
    help="Only this rank; may be repeated.",
)
@click.option("--last", is_flag=True, help="Only the newest incarnation.")
@click.option("-f", "--follow", is_flag=True, help="Print what comes, until the job ends.")
@click.option(
    "--processes",
    is_flag=True,
    help="The log of elastic-ckpt's own processes by time: supervisors, agents, workers.",
)
def command(
    directory: Path | BucketUrl, ranks: tuple[int, ...], last: bool, follow: bool, processes: bool
) -> int:
    """Print the workers' output of the job in DIR, by incarnation.

    \b
      elastic-ckpt logs checkpoints --last
      elastic-ckpt logs checkpoints --rank 3 | less
      elastic-ckpt logs checkpoints --follow --rank 0
      elastic-ckpt logs checkpoints --processes --last
      elastic-ckpt logs s3://bucket/job

    Of a progress bar the last state is printed. --follow begins with the last 20 lines of each rank
    of the newest incarnation, and ends with the job.

    Kept are the newest 20 incarnations, with 16 to 32 MB of each rank, and 4 to 8 MB of each
    process's log. In a bucket there is the end of what the ranks of the newest incarnation
    printed, up to 1 MiB each.

    Exits with 0, or with 64 if there is no output.
    """
    if follow and (processes or isinstance(directory, BucketUrl)):
        raise UsageError("--follow is for what workers print into a directory on this machine")
    if isinstance(directory, BucketUrl):
        from elastic_ckpt.cli.bucket.history import bucket_logs

        lines = bucket_logs(directory, ranks, processes=processes)
    else:
        try:
            job = open_job(directory)
        except JobNotBegun as error:
            return show_not_begun(error)
        if follow and not _is_over(job):
            return _follow(job, ranks)
        last = last or follow
        lines = _processes(job, ranks, last) if processes else _printed(job, ranks, last)
    for line in lines:
        click.echo(line)
    return 0


def _follow(job: JobDirectory, ranks: tuple[int, ...]) -> int:
    """Follow until the job ends, and say how it did; or until Ctrl-C."""
    from elastic_ckpt.jobdir.log_follower import LogFollower

    follower = LogFollower(job, ranks, lambda: _is_over(job), time.monotonic, time.sleep)
    with contextlib.suppress(KeyboardInterrupt):
        for line in follower.lines():
            click.echo(line)
        record = shown_record(job_records(job))
        ended = record.message if record is not None and record.state in TERMINAL else "killed"
        status = command_line("status", job.root)
        click.echo(f"elastic-ckpt: the job has ended: {printable(ended)}: {status}", err=True)
    return 0


def _is_over(job: JobDirectory) -> bool:
    """Return whether no supervisor runs the job, as far as is known here."""
    record = shown_record(job_records(job))
    if record is None or record.state in TERMINAL:
        return True
    alive = record.owner.is_alive()
    if alive is None:
        return is_silent(read_heartbeat(job, record.node))
    return not alive


def _of_ranks(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f" of rank {', '.join(map(str, ranks[:_NAMED]))}{more}" if ranks else ""


def _printed(job: JobDirectory, ranks: Sequence[int], last: bool) -> Iterator[str]:
    logs = log_files(job)
    newest = max((found[0] for found in rank_files(job, "")), default=0)
    if last:
        logs = [log for log in logs if log.incarnation == newest]
    printed = sorted({log.rank for log in logs})
    if ranks:
        logs = [log for log in logs if log.rank in ranks]
    if not logs:
        others = f"; there is some{_of_ranks(printed)}" if printed else ": see elastic-ckpt status"
        where = f" of incarnation {newest}" if last and newest else ""
        raise UsageError(f"no worker output{where}{_of_ranks(ranks)} in {job.logs}{others}")
    for log in logs:
        yield f"== incarnation {log.incarnation}, rank {log.rank}"
        yield from log.lines()


def _processes(job: JobDirectory, ranks: Sequence[int], last: bool) -> Iterator[str]:
    from elastic_ckpt.jobdir.process_log import read_process_logs

    lines = read_process_logs(job)
    if last:
        newest = max((line.incarnation or 0 for line in lines), default=0)
        lines = [line for line in lines if (line.incarnation or 0) == newest]
    if ranks:
        lines = [line for line in lines if line.rank in ranks]
    if not lines:
        raise UsageError(f"no process log{_of_ranks(ranks)} in {job.logs}")
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
