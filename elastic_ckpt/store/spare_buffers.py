"""Buffers of the memory tier that are there before a save asks for them."""

from __future__ import annotations

import os
from pathlib import Path

from elastic_ckpt.util.files import remove_tree
from elastic_ckpt.checkpoint.memory.mapped_file import MAPPED_FROM_BYTES
from elastic_ckpt.checkpoint.memory.tier import MemoryTier, Sealed
from elastic_ckpt.checkpoint.memory.room import room_bytes


def make_spare_buffers(tier: MemoryTier, like: Sealed) -> None:
    """Reserve for the other generation what its first save will take, pages and all.

    Does nothing where a save was there already, or where there is no room: then the ranks make
    the files themselves, and training waits for it. May be called beside a save: a file that it
    makes has no seal, and a rank takes it whole or not at all.
    """
    other = next(one for one in tier.generations if one != like.generation)
    if other.path.exists() or other.spare.exists():
        return
    if room_bytes(tier.root) < like.seal.total_bytes:
        return
    making = other.slot / "making"
    remove_tree(making)  # of a run that was killed
    try:
        for entry in like.seal.files:
            if entry.bytes >= MAPPED_FROM_BYTES:
                _reserve(making / entry.path, entry.bytes)
        os.rename(making, other.spare)
    except OSError:  # no memory, after all
        remove_tree(making)
    if other.path.exists():  # a save came first, and needs none of it any more
        remove_tree(other.spare)


def _reserve(path: Path, size: int) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
    finally:
        os.close(fd)
