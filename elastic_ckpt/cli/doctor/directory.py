"""The directory that checkpoints are to go to: what is there, and what fits beside it."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.util.bounded import Refused, Silent, answer
from elastic_ckpt.cli.doctor.findings import Finding, ok
from elastic_ckpt.policy.emergency import Outlook, save_seconds
from elastic_ckpt.util.progress import human_bytes
from elastic_ckpt.errors import DirectoryUnusable, UsageError
from elastic_ckpt.checkpoint.catalog import newest_valid
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.checkpoint.memory.tier import tier_of, tier_path
from elastic_ckpt.jobdir.prediction_file import read_predictor
from elastic_ckpt.jobdir.node_record import node_name
from elastic_ckpt.jobdir.slurm_jobs import find_job, is_job_number
from elastic_ckpt.checkpoint.space import RESERVE_BYTES, free_bytes

MEMORY: Final = Path("/dev/shm")

_LOOK_SECONDS: Final = 20.0


class Place(msgspec.Struct, frozen=True):
    """A directory for checkpoints, as it is now.

    Attributes:
        root: absolute, without links.
        tried: it, or what is there above it while it is not.
        free_bytes: what this user may still write.
        newest: name of the newest valid checkpoint; empty if there is none.
        state_bytes: of that checkpoint; 0 if there is none.
        saved_seconds: what a save of it takes at the worst, as the job's own saves have it; None
            if there were none.
        held_bytes: what the job's memory tier on this node takes already.
    """

    root: str
    tried: str
    free_bytes: int
    newest: str = ""
    state_bytes: int = 0
    saved_seconds: float | None = None
    held_bytes: int = 0

    @property
    def is_there(self) -> bool:
        """Whether the directory exists."""
        return self.root == self.tried


def named(directory: str | None) -> str | None:
    """A directory, or that of a SLURM job if it is the number of one.

    Raises:
        UsageError: nothing is known of that job.
    """
    if directory is None or not is_job_number(directory) or os.path.lexists(directory):
        return directory
    found = find_job(directory)
    if found is None:
        raise UsageError(
            f"no directory {directory}, and of no SLURM job {directory} the directory is known "
            "here: give it"
        )
    return str(found)


def look_at(directory: str | None) -> Place | Finding:
    """What is there; a finding if that cannot be said."""
    if directory is None:
        return ok("directory", "not tried: give the directory that checkpoints go to (doctor DIR)")
    try:
        found: Place = answer(lambda: _look(directory), Place, _LOOK_SECONDS)
    except Silent as error:
        todo = "see whether the storage is up: a run would wait for it, too"
        return Finding("directory", "problem", f"{directory}: {error}", todo)
    except Refused as error:
        todo = "run as its owner, or choose another directory"
        return Finding("directory", "problem", f"{directory}: {error}", todo)
    return found


def check_directory(place: Place) -> Iterator[Finding]:
    """What it holds, and whether two more checkpoints fit."""
    if not place.is_there:
        yield ok("directory", f"{place.root} is to be made: tried was {place.tried}")
    elif place.newest:
        size = human_bytes(place.state_bytes)
        text = f"{place.root}: {place.newest} is the newest valid checkpoint, {size}"
        yield ok("directory", text, place.state_bytes, "bytes")
    else:
        yield ok("directory", f"{place.root}: no valid checkpoint yet")
    yield _space(place)


def _space(place: Place) -> Finding:
    free, state = place.free_bytes, place.state_bytes
    if free == sys.maxsize:
        return ok("free space", "the file system does not say")
    text = f"{human_bytes(free)} free"
    if not state:
        return ok("free space", text, free, "bytes")
    fits = max(0, free - RESERVE_BYTES) // state
    if fits >= 2:
        text += f": room for {fits:,} more checkpoints"
        return ok("free space", text, free, "bytes")
    text += f", and a checkpoint takes {human_bytes(state)}"
    todo = "delete something there, or keep fewer checkpoints (--keep-last)"
    # One is written before an old one goes.
    return Finding("free space", "warning" if fits else "problem", text, todo, free, "bytes")


def _look(directory: str) -> Generator[Place, None, None]:
    job = JobDirectory.at(directory)
    tried = _nearest(job.root)
    place = Place(str(job.root), str(tried), free_bytes(tried))
    newest = newest_valid(job) if tried == job.root else None
    if newest is not None and newest.manifest is not None:
        size = newest.manifest.total_bytes
        tier = tier_of(job, str(tier_path(MEMORY, job, node_name())))
        place = msgspec.structs.replace(
            place,
            newest=newest.path.name,
            state_bytes=size,
            saved_seconds=save_seconds(read_predictor(job), Outlook(0.0, 0.0, size)),
            held_bytes=tier.held_bytes() if tier else 0,
        )
    yield place


def _nearest(path: Path) -> Path:
    """It, or the directory above it that is there.

    Raises:
        DirectoryUnusable: what is there is none.
        OSError: this user may not see it.
    """
    while True:
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
            continue
        if not stat.S_ISDIR(found.st_mode):
            raise DirectoryUnusable(f"{path} is no directory")
        return path
