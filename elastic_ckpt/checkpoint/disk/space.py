"""Free space, and whether a save fits."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.tier import TierFull
from elastic_ckpt.util.units import human_bytes

RESERVE_BYTES: Final = 1024 * 1024
"""Left free by a save, so that the job can still write its records."""


def free_bytes(directory: Path) -> int:
    """Return the bytes that this user may still write; ``sys.maxsize`` if unknown."""
    found = os.statvfs(directory)
    if not found.f_blocks:
        return sys.maxsize
    return found.f_bavail * found.f_frsize


def ensure_space(directory: Path, needed: int, make_room: Callable[[], None]) -> None:
    """Return if this many bytes fit, after making room if necessary. TierFull if they do not fit
    even so, OSError if the storage does not answer."""
    needed += RESERVE_BYTES
    if free_bytes(directory) >= needed:
        return
    make_room()
    free = free_bytes(directory)
    if free < needed:
        raise TierFull(
            0,
            f"it needs about {human_bytes(needed)}, and {directory} has {human_bytes(free)} free: "
            "delete something there, or keep fewer checkpoints (--keep-last)",
        )
