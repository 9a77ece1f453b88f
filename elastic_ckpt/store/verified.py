"""Which checkpoints were verified in full, once: a small file for each, with its attempt's id."""

from __future__ import annotations

import contextlib
from pathlib import Path

from elastic_ckpt.checkpoint.manifest import SealHeader
from elastic_ckpt.errors import DirectoryUnusable
from elastic_ckpt.util.files import read_bounded, write_atomic
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key


def mark_verified(job: JobDirectory, checkpoint: Path, manifest: SealHeader) -> None:
    """Every byte of it was read and matched; where nothing may be written this is not kept."""
    with contextlib.suppress(OSError, DirectoryUnusable):
        if checkpoint_key(checkpoint.name) is None or checkpoint.parent != job.root:
            return
        if not job.owns(job.control):
            return
        job.require(job.verified)
        write_atomic(job.verified / checkpoint.name, manifest.attempt.encode())


def is_verified(job: JobDirectory, checkpoint: Path, manifest: SealHeader) -> bool:
    """Whether this very checkpoint, not another of its name, was verified in full."""
    if not job.owns(job.verified):
        return False
    try:
        return read_bounded(job.verified / checkpoint.name, 64) == manifest.attempt.encode()
    except OSError:
        return False


def unmark(job: JobDirectory, checkpoint: Path) -> None:
    """It is gone."""
    if not job.owns(job.verified):
        return
    with contextlib.suppress(OSError):
        (job.verified / checkpoint.name).unlink(missing_ok=True)
