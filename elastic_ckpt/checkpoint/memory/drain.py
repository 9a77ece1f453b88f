"""The copy from the memory tier to another one."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.manifest import FileEntry, header_of
from elastic_ckpt.checkpoint.memory.generation import Sealed
from elastic_ckpt.checkpoint.memory.mapped_file import MAPPED_FROM_BYTES
from elastic_ckpt.checkpoint.memory.room import room_bytes
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.tier import Attempt, Part, Sink, Tier
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.util.files import open_regular, remove_tree

CHUNK_BYTES: Final = 16 * 1024 * 1024
"""Bytes copied between two pauses; a multiple of every page size."""


Copying = Generator[int, None, list[FileEntry]]
"""Yields bytes copied since the last time; returns the files that were copied."""


def copy_share(sealed: Sealed, attempt: Attempt) -> Copying:
    """Copy what is in a generation into an attempt of another tier. Raises as :func:`drain`."""
    seal = sealed.seal
    files: list[FileEntry] = []
    for rank in seal.ranks:
        part = attempt.part(rank)
        yield from _copy_part(sealed, part)
        files += part.finish(seal.world_size, header_of(seal) if rank == 0 else None)
    return files


def drain(
    sealed: Sealed, target: Tier, copy: Callable[[Sealed, Attempt], Copying] = copy_share
) -> Generator[int, None, None]:
    """Copy a generation to another tier and seal it there, while training goes on.

    A generator, so that its caller may pause it between two chunks, or hand it to another thread.
    Closing it early drops what was copied. Does nothing if the target holds the attempt already.

    Args:
        copy: returns the files of all ranks, also those that other nodes have in their memory.

    Yields:
        Bytes copied since the last time.

    Raises:
        TierFull: there is no room.
        OSError: the storage failed.
        CheckpointRejected: the generation is not what its seal says.
    """
    seal = sealed.seal
    lock = sealed.generation.lock()
    try:
        if target.holds(seal):
            return
        attempt = target.begin(seal.step, seal.total_bytes, seal.attempt)
        try:
            files = yield from copy(sealed, attempt)
            attempt.seal(header_of(seal), files, seal.retention)
        except BaseException:  # GeneratorExit too: it was closed
            attempt.drop()
            raise
    finally:
        lock.release()


def _copy_part(sealed: Sealed, part: Part) -> Iterator[int]:
    for entry in sealed.seal.files:
        if entry.rank == part.rank:
            source = sealed.generation.path / entry.path
            with part.open(entry.path, entry.bytes, paged=True) as target:
                yield from _copy_file(source, entry, target)


def _copy_file(source: Path, entry: FileEntry, target: Sink) -> Iterator[int]:
    with open(open_regular(source), "rb") as file:
        fd = file.fileno()
        if os.fstat(fd).st_size != entry.bytes:
            raise CheckpointRejected(f"{entry.path} is not what the seal says")
        for offset in range(0, entry.bytes, CHUNK_BYTES):
            length = min(CHUNK_BYTES, entry.bytes - offset)
            # A window at a time, so that the copy is not counted as this process's memory.
            with closing(mmap.mmap(fd, length, prot=mmap.PROT_READ, offset=offset)) as window:
                target.write(window)
            yield length


def make_spare_buffers(tier: MemoryTier, like: Sealed) -> None:
    """Allocate for the other generation what its first save will need, including its pages.

    Does nothing if a save came first, or without room: the ranks then make the files themselves,
    while training waits. May run during a save: its files have no seal, and a rank takes such a
    file by one rename.
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
