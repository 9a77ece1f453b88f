"""Arguments and options shared by several commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.slurm_jobs import find_job, is_job_number

F = TypeVar("F", bound=Callable[..., Any])


class _Directory(click.Path):
    """A path, or the number of a SLURM job in place of its directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; the directory of a SLURM job for its number."""
        if isinstance(value, str) and is_job_number(value) and not Path(value).exists():
            found = find_job(value)
            if found is None:
                self.fail(
                    f"{value} is neither a directory nor a known SLURM job; pass the job directory",
                    param,
                    ctx,
                )
            return found
        return super().convert(value, param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[Any]]:
        """Complete directories only."""
        return [CompletionItem(incomplete, type="dir")]


def directory_argument(function: F) -> F:
    """Add ``[DIR]``: a directory or a SLURM job's number; default ``$ELASTIC_CKPT_DIR``."""
    return click.argument(
        "directory",
        metavar="[DIR]",
        envvar="ELASTIC_CKPT_DIR",
        type=_Directory(path_type=Path, readable=False),  # open_job checks it, with exit code 73
        required=True,
    )(function)


def timeout_option(function: F) -> F:
    """Add ``--timeout``, for commands that wait for a checkpoint."""
    return click.option(
        "--timeout",
        metavar="SECONDS",
        default=300.0,
        show_default=True,
        type=click.FloatRange(min=0),
        help="Seconds to wait for the checkpoint.",
    )(function)


def open_job(directory: Path) -> JobDirectory:
    """Return a readable job directory.

    Raises:
        DirectoryUnusable: it cannot be read.
    """
    job = JobDirectory.at(directory)
    job.check_readable()
    return job
