"""The newest checkpoint, set aside because the job fails whenever it goes on from it."""

from __future__ import annotations

from pathlib import Path

from elastic_ckpt.errors import CheckpointError
from elastic_ckpt.checkpoint.catalog import scan
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.checkpoint.quarantine import set_aside
from elastic_ckpt.checkpoint.verify import verify_quick


def bypassed_and_older(job: JobDirectory) -> tuple[Path, Path] | None:
    """The newest valid checkpoint and the one before it; None if there are not two.

    Raises:
        OSError: the disk does not answer.
    """
    found: list[Path] = []
    for path in scan(job):
        try:
            verify_quick(path)
        except CheckpointError:
            continue
        found.append(path)
        if len(found) == 2:
            return found[0], found[1]
    return None


def bypass(job: JobDirectory, newest: Path, why: str) -> Path:
    """Set it aside, as a bad one is, so that no restart takes it again; where it is now.

    Raises:
        OSError: the disk says no.
    """
    return set_aside(job, newest, f"bypassed: {why}")
