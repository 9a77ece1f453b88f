"""Which checkpoints were verified in full, once: a small file for each, with its attempt's id."""

from __future__ import annotations

import contextlib
from pathlib import Path

from elastic_ckpt.core.manifest import Manifest
from elastic_ckpt.store.files import read_bounded, write_atomic
from elastic_ckpt.store.layout import JobDirectory


def mark_verified(job: JobDirectory, checkpoint: Path, manifest: Manifest) -> None:
    """Every byte of it was read and matched; where nothing may be written this is not kept."""
    with contextlib.suppress(OSError):
        if checkpoint.parent != job.root or not job.control.is_dir():
            return
        job.ensure(job.verified)
        write_atomic(job.verified / checkpoint.name, manifest.attempt.encode())


def is_verified(job: JobDirectory, checkpoint: Path, manifest: Manifest) -> bool:
    """Whether this very checkpoint, not another of its name, was verified in full."""
    try:
        return read_bounded(job.verified / checkpoint.name, 64) == manifest.attempt.encode()
    except OSError:
        return False


def unmark(job: JobDirectory, checkpoint: Path) -> None:
    """It is gone."""
    with contextlib.suppress(OSError):
        (job.verified / checkpoint.name).unlink(missing_ok=True)
