"""When a job's checkpoints will have filled its disk."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final, NamedTuple

from elastic_ckpt.checkpoint.catalog import CheckpointView, scan
from elastic_ckpt.checkpoint.disk.space import free_bytes
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.retention_file import read_rule

_FEWEST: Final = 4
_NEWEST: Final = 8
"""How many of the newest checkpoints the pace is taken from."""


class Filling(NamedTuple):
    """A disk that fills up: ``seconds`` left at the pace of the newest saves."""

    seconds: float
    free: int
    checkpoint_bytes: int


def filling(job: JobDirectory, newest: CheckpointView | None, now: float) -> Filling | None:
    """Return when the disk will be full; None where retention removes checkpoints, or where too
    few are there to tell. ``now`` is seconds since the epoch."""
    if newest is None or newest.seal is None or newest.tier != "disk" or newest.foreign:
        return None
    session = job.session(newest.session)
    if read_rule(session):
        return None
    with contextlib.suppress(OSError):
        saved = [_saved_at(path) for path in scan(session)[:_NEWEST]]
        span = now - min(saved, default=now)
        if len(saved) < _FEWEST or span <= 0:
            return None
        size, free = newest.seal.total_bytes, free_bytes(job.root)
        return Filling(free / (max(1, size) * len(saved) / span), free, size)
    return None


def _saved_at(path: Path) -> float:
    return path.stat(follow_symlinks=False).st_mtime
