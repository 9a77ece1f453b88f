"""What is known of SLURM jobs: one small file each in the user's state directory.

With a shared home directory ``elastic-ckpt status JOBID`` so works on a login node, before the
job starts and after it has left the queue.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from elastic_ckpt.util.files import read_bounded, write_atomic

MAX_KEPT: Final = 1000
_NUMBER: Final = re.compile(r"[0-9]{1,18}(_[0-9]{1,18})?", re.ASCII)
_MAX_BYTES: Final = 64 * 1024
_MAX_TASKS: Final = 100_000


class SlurmJob(NamedTuple):
    """A SLURM job, or a task of a job array.

    Attributes:
        directory: of the job; of an array that of all its tasks.
        submit: the command of ``slurm submit`` for a shell; empty for another batch script.
        array: the tasks of a whole array, as sbatch takes them; empty for a job or one task.
    """

    directory: Path
    submit: str = ""
    array: str = ""

    def task(self, number: int) -> SlurmJob:
        """Return one task of an array."""
        return SlurmJob(task_directory(self.directory, number), f"{self.submit} --array={number}")


def task_directory(directory: Path, number: int) -> Path:
    """Return the directory of a task of an array that ``slurm submit`` submitted."""
    return directory / f"task-{number}"


def task_numbers(array: str) -> list[int]:
    """Return the tasks of ``1-8%2``, ``0-7:2`` or ``3,5``; empty if it cannot be read."""
    found: list[int] = []
    for part in array.partition("%")[0].split(","):
        read = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9})(?::(\d{1,9}))?)?", part, re.ASCII)
        if read is None:
            return []
        numbers = range(int(read[1]), int(read[2] or read[1]) + 1, int(read[3] or 1) or 1)
        found += numbers[:_MAX_TASKS]
    return found


def is_job_number(text: str) -> bool:
    """Whether the text is a job number: ``1234``, or ``1234_5`` for a task of an array."""
    return _NUMBER.fullmatch(text) is not None


def remember_job(number: str, job: SlurmJob, environ: Mapping[str, str] = os.environ) -> None:
    """Record a job; if that fails, ``status`` needs the directory instead."""
    place = _place(environ)
    if not is_job_number(number) or place is None:
        return
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        fields = (os.fsencode(job.directory), os.fsencode(job.submit), os.fsencode(job.array))
        write_atomic(place / number, b"\0".join(fields).rstrip(b"\0"))
        kept = sorted(place.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in kept[:-MAX_KEPT]:
            old.unlink(missing_ok=True)


def find_job(number: str, environ: Mapping[str, str] = os.environ) -> SlurmJob | None:
    """Return a job, or a task of an array by the array's record; None if it is unknown."""
    place = _place(environ)
    if not is_job_number(number) or place is None:
        return None
    try:
        fields = read_bounded(place / number, _MAX_BYTES).split(b"\0")
    except OSError:
        array, _, task = number.partition("_")
        whole = find_job(array, environ) if task else None
        return whole.task(int(task)) if whole is not None and whole.array else None
    directory, submit, array = [*map(os.fsdecode, fields), "", ""][:3]
    return SlurmJob(Path(directory), submit, array)


def has_jobs(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether any job is recorded."""
    place = _place(environ)
    with contextlib.suppress(OSError):  # another user may not look
        return place is not None and place.is_dir()
    return False


def _place(environ: Mapping[str, str]) -> Path | None:
    home = environ.get("HOME")
    state = environ.get("XDG_STATE_HOME") or (f"{home}/.local/state" if home else "")
    return Path(state) / "elastic-ckpt" / "slurm" if state.startswith("/") else None
