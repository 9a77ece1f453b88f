"""What several commands share."""

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
    """A path, or the number of a SLURM job, which stands for the job's directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does."""
        if isinstance(value, str) and is_job_number(value) and not Path(value).exists():
            found = find_job(value)
            if found is None:
                self.fail(
                    f"no directory {value}, and of no SLURM job {value} the directory is known "
                    "here: give it",
                    param,
                    ctx,
                )
            return found
        return super().convert(value, param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[Any]]:
        """Directories alone."""
        return [CompletionItem(incomplete, type="dir")]


def directory_argument(function: F) -> F:
    """``[DIR]``, which defaults to ``$ELASTIC_CKPT_DIR``; or the number of a SLURM job."""
    return click.argument(
        "directory",
        metavar="[DIR]",
        envvar="ELASTIC_CKPT_DIR",
        type=_Directory(path_type=Path, readable=False),  # or it would be a wrong call
        required=True,
    )(function)


def timeout_option(function: F) -> F:
    """``--timeout``, for those who wait for a checkpoint."""
    return click.option(
        "--timeout",
        metavar="SECONDS",
        default=300.0,
        show_default=True,
        type=click.FloatRange(min=0),
        help="Seconds to wait for the checkpoint.",
    )(function)


def open_job(directory: Path) -> JobDirectory:
    """A job directory that can be read; DirectoryUnusable otherwise."""
    job = JobDirectory.at(directory)
    job.check_readable()
    return job


def human_age(seconds: float | None) -> str:
    """``3 min``."""
    if seconds is None:
        return "-"
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
