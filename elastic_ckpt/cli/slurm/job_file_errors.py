"""Errors in a job file, in the words of who submits it: its keys, and ``slurm submit`` again."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from elastic_ckpt.cli.run.entry import NO_SCRIPT
from elastic_ckpt.errors import UsageError, note_next_steps
from elastic_ckpt.jobdir.run_command import PROGRAM, command_line


@contextlib.contextmanager
def job_file_errors(job_file: Path, options: Sequence[str]) -> Iterator[None]:
    """Let usage errors of ``run`` name the job file and its keys, and the command to repeat.

    Args:
        options: of sbatch, as they were given.
    """
    try:
        yield
    except UsageError as error:
        raise _in_the_file(error, job_file, options) from None


def _in_the_file(error: UsageError, job_file: Path, options: Sequence[str]) -> UsageError:
    from elastic_ckpt.cli.run.command import command as run
    from elastic_ckpt.cli.run.job_file import option_keys

    keys = option_keys(run)
    text = str(error).replace(NO_SCRIPT, "missing script: the training script, or module = NAME")
    text = text.removeprefix(f"--config {job_file}").removeprefix(":").strip()
    text = re.sub(r"^Missing option '--([a-z-]+)'.*", r"missing \1", text)
    text = re.sub(r"--([a-z][a-z-]+)", lambda one: one[one[1] in keys], text)
    named = UsageError(f"{job_file}: {text}")
    again = command_line("slurm", "submit", job_file, *(("--", *options) if options else ()))
    note_next_steps(named, (f"{PROGRAM}: next: correct the job file, then:", f"  {again}"))
    return named
