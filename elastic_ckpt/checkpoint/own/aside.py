"""Where one of the script's own checkpoints goes that no restart may load."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.quarantine import set_aside
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import sync_directory

ASIDE: Final = ".set-aside"
"""Beside the checkpoint, where the job directory is on another file system."""


def set_own_aside(job: JobDirectory, path: Path, why: str, name: str) -> Path:
    """Move a checkpoint of the script's, or a copy of the one called ``name``, to the job's
    quarantine, and return where it is.

    Raises:
        OSError: it cannot be moved.
    """
    if os.lstat(path).st_dev == os.stat(job.root).st_dev:
        try:
            return set_aside(job, path, why, name=name)
        except OSError as error:
            if error.errno != errno.EXDEV:  # two mounts of one file system
                raise
    place = path.parent / ASIDE
    place.mkdir(mode=0o700, exist_ok=True)
    target = place / f"{name}-{secrets.token_hex(6)}"
    os.rename(path, target)
    sync_directory(place)
    sync_directory(path.parent)
    return target
