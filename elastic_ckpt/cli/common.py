"""Arguments, options, input and output shared by several commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from click.shell_completion import CompletionItem

from elastic_ckpt.checkpoint.bucket.url import BucketUrl, is_url
from elastic_ckpt.errors import ElasticCkptError, ExitCode, JobNotBegun, UsageError
from elastic_ckpt.jobdir.answering import require_answer
from elastic_ckpt.jobdir.node_record import NodeRecord
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.slurm_jobs import SlurmJob, find_job, is_job_number, task_numbers
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Slot
from elastic_ckpt.util.text import shown_json
from elastic_ckpt.util.units import parse_bytes, parse_duration

_SLURM_JOB: Final = "elastic_ckpt.slurm_job"


class DirectoryOrUrl(click.ParamType[Path | BucketUrl]):
    """A path, or the URL of a bucket.

    The path is not looked at: :func:`open_job` has a better exit code, and dead storage would
    block ``doctor`` forever.
    """

    name = "directory"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | BucketUrl:
        """Return either."""
        if isinstance(value, str) and is_url(value):
            return BucketUrl.parse(value)
        return Path(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[Any]]:
        """Complete directories only."""
        return [CompletionItem(incomplete, type="dir")]


class Duration(click.FloatRange):
    """Seconds, as a number or a duration like ``90s``, ``2m`` and ``6h30m``."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the seconds."""
        if isinstance(value, str):
            try:
                value = parse_duration(value)
            except UsageError as error:
                self.fail(str(error), param, ctx)
        return float(super().convert(value, param, ctx))


class Size(click.FloatRange):
    """Bytes, as a number or a size like ``50MB``, ``1.5GB`` and ``64MiB``; at least one."""

    name = "size"

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the bytes."""
        if isinstance(value, str):
            try:
                value = parse_bytes(value)
            except UsageError as error:
                self.fail(str(error), param, ctx)
        return float(super().convert(value, param, ctx))


class JobPath(DirectoryOrUrl):
    """The same, or the number of a SLURM job in place of its directory."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | BucketUrl:
        """Return the path, the directory of a SLURM job for its number, or the URL."""
        if not isinstance(value, str) or not is_job_number(value) or os.path.lexists(value):
            return super().convert(value, param, ctx)
        found = find_job(value)
        if found is None:
            unknown = "neither a directory nor a known SLURM job; pass the job directory"
            self.fail(f"{value} is {unknown}", param, ctx)
        if found.array:
            self.fail(f"{value} is a job array: name a task, {_tasks(value, found)}", param, ctx)
        if ctx is not None:
            ctx.meta[_SLURM_JOB] = value
        return found.directory


def _tasks(number: str, job: SlurmJob) -> str:
    """Return the tasks of an array as a user names them."""
    tasks = [f"{number}_{task}" for task in task_numbers(job.array)] or [f"{number}_TASK"]
    return ", ".join(tasks) if len(tasks) <= 4 else f"{tasks[0]}, {tasks[1]} ... {tasks[-1]}"


def slurm_number() -> str:
    """Return the number of the SLURM job that the user named in place of a directory; else empty.
    Called in a command."""
    context = click.get_current_context(silent=True)
    return str(context.meta.get(_SLURM_JOB, "")) if context is not None else ""


directory_argument = click.argument(
    "directory", metavar="[DIR]", envvar="ELASTIC_CKPT_DIR", type=JobPath(), required=True
)
"""``[DIR]``: a directory, a SLURM job's number or a URL; default ``$ELASTIC_CKPT_DIR``."""

timeout_option = click.option(
    "--timeout",
    metavar="DURATION",
    default="5m",
    show_default=True,
    type=Duration(min=0),
    help="How long to wait for the checkpoint.",
)


def open_job(directory: Path | BucketUrl) -> JobDirectory:
    """Return a readable job directory.

    Raises:
        DirectoryUnusable: it cannot be read, or its storage does not answer.
        JobNotBegun: it does not exist, and is that of a SLURM job.
        UsageError: it is in a bucket.
    """
    if isinstance(directory, BucketUrl):
        raise UsageError(
            f"this needs a directory: elastic-ckpt pull {directory} DIR brings the job into one"
        )
    require_answer(directory)
    job = JobDirectory.at(directory)
    if not os.path.lexists(directory):
        from elastic_ckpt.cli.slurm.queue import ask_slurm, not_begun

        slurm = ask_slurm(directory, slurm_number())
        if slurm is not None:
            raise JobNotBegun(not_begun(slurm)[1], has_it=slurm.has_it)
    job.check_readable()
    return job


def show_not_begun(error: JobNotBegun) -> int:
    """Say that there is nothing to show yet; return the command's exit code."""
    if not error.has_it:
        raise error
    click.echo(f"elastic-ckpt: {error}", err=True)
    return int(ExitCode.FINISHED)


def read_slots(record: NodeRecord) -> list[Slot]:
    """Return the ranks on a node's board; none of another host or user, or of an ended job."""
    try:
        return Board.open(record.board, writable=False).read_slots()
    except (OSError, ValueError, TypeError, IndexError, ElasticCkptError):
        return []


def echo_json(value: Any) -> None:
    """Print a value as one line of JSON."""
    click.echo(shown_json(msgspec.json.encode(value)))
