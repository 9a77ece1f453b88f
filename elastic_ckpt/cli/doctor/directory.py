"""The job directory: its checkpoints, and whether more will fit."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.catalog import newest_and_rejected, newest_of_job
from elastic_ckpt.checkpoint.disk.space import RESERVE_BYTES, free_bytes
from elastic_ckpt.checkpoint.memory.tier import tier_of
from elastic_ckpt.cli.doctor.findings import Finding, ok, untried
from elastic_ckpt.errors import DirectoryUnusable
from elastic_ckpt.jobdir.node_record import job_records
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.prediction_file import read_predictor
from elastic_ckpt.jobdir.run_command import command_line
from elastic_ckpt.policy.emergency import Outlook, save_seconds
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answer
from elastic_ckpt.util.units import human_bytes

INSPECT_SECONDS: Final = 20.0


class CheckedPath(msgspec.Struct, frozen=True):
    """A job directory and what it contains.

    Attributes:
        root: absolute, without links.
        tested: the directory to test: ``root`` or its nearest existing parent.
        free_bytes: what this user can still write.
        newest: name of the newest intact checkpoint; empty if none.
        state_bytes: size of that checkpoint; 0 if none.
        saved_seconds: worst-case duration of a save, from the job's own saves; None without any.
        held_bytes: what the job's memory tier already takes on this node.
        damaged: the number of checkpoints, if there are some and none is intact; else 0.
    """

    root: str
    tested: str
    free_bytes: int
    newest: str = ""
    state_bytes: int = 0
    saved_seconds: float | None = None
    held_bytes: int = 0
    damaged: int = 0

    @property
    def exists(self) -> bool:
        """Whether the directory exists."""
        return self.root == self.tested


def inspect_directory(directory: Path | None) -> CheckedPath | Finding:
    """Inspect a directory in a child process; return a finding if that fails."""
    if directory is None:
        return untried("directory", "not tried: give the job directory (doctor DIR)")
    try:
        found: CheckedPath = answer(lambda: _inspect(directory), CheckedPath, INSPECT_SECONDS)
    except NoAnswer as error:
        todo = "check the storage: a run would block on it as well"
        return Finding("directory", "problem", f"{directory}: {error}", todo)
    except WorkFailed as error:
        todo = "run as its owner, or choose another directory"
        return Finding("directory", "problem", f"{directory}: {error}", todo)
    return found


def check_directory(path: CheckedPath) -> Iterator[Finding]:
    """Check the newest checkpoint, and whether two more fit."""
    if not path.exists:
        yield untried("directory", f"{path.root} does not exist yet; tested {path.tested}")
    elif path.newest:
        size = human_bytes(path.state_bytes)
        text = f"{path.root}: {path.newest} is the newest intact checkpoint, {size}"
        yield ok("directory", text, path.state_bytes, "bytes")
    elif path.damaged:
        text = f"{path.root}: none of its checkpoints is intact ({path.damaged} damaged)"
        todo = f"see why: {command_line('list', path.root)}; to start over use an empty --dir"
        yield Finding("directory", "problem", f"{text}: a start would end with 65", todo)
    else:
        yield ok("directory", f"{path.root}: no intact checkpoint yet")
    yield _space(path)


def _space(path: CheckedPath) -> Finding:
    free, state = path.free_bytes, path.state_bytes
    if free == sys.maxsize:
        return untried("free space", "not reported by the file system")
    text = f"{human_bytes(free)} free"
    if not state:
        return ok("free space", text, free, "bytes")
    fits = max(0, free - RESERVE_BYTES) // state
    if fits >= 2:
        text += f": room for {fits:,} more checkpoints"
        return ok("free space", text, free, "bytes")
    text += f", and a save needs about {human_bytes(state + RESERVE_BYTES)}"
    todo = "free some space, or keep fewer checkpoints (--keep-last)"
    # A checkpoint is written before an old one is deleted.
    return Finding("free space", "warning" if fits else "problem", text, todo, free, "bytes")


def _inspect(directory: Path) -> Generator[CheckedPath, None, None]:
    job = JobDirectory.at(directory)
    tested = nearest(job.root)
    path = CheckedPath(str(job.root), str(tested), free_bytes(tested))
    newest = newest_of_job(job) if tested == job.root else None
    if newest is None and tested == job.root:
        path = msgspec.structs.replace(path, damaged=_damaged(job))
    if newest is not None and newest.manifest is not None:
        size = newest.manifest.total_bytes
        record = next(iter(job_records(job)), None)
        tier = tier_of(job, record.memory) if record else None
        path = msgspec.structs.replace(
            path,
            newest=newest.path.name,
            state_bytes=size,
            saved_seconds=save_seconds(read_predictor(job), Outlook(0.0, 0.0, size)),
            held_bytes=tier.held_bytes() if tier else 0,
        )
    yield path


def _damaged(job: JobDirectory) -> int:
    """Return the number of checkpoints, if none is intact on the disk or in memory."""
    record = next(iter(job_records(job)), None)
    newest, rejected = newest_and_rejected(job, record.memory if record else "")
    return 0 if newest is not None else sum(not one.foreign for one in rejected)


def nearest(path: Path) -> Path:
    """Return the path or its nearest existing parent.

    Raises:
        DirectoryUnusable: that is not a directory.
        OSError: this user may not access it.
    """
    while True:
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
            continue
        if not stat.S_ISDIR(found.st_mode):
            raise DirectoryUnusable(f"{path} is not a directory")
        return path
