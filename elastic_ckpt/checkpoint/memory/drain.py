"""From the memory tier to the disk: every byte is hashed on the way, and sealed there."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.disk.part import DiskPart, Sink
from elastic_ckpt.checkpoint.disk.space import ensure_space
from elastic_ckpt.checkpoint.manifest import FileEntry, MemorySeal, header_of
from elastic_ckpt.checkpoint.memory.mapped_file import MAPPED_FROM_BYTES
from elastic_ckpt.checkpoint.memory.room import room_bytes
from elastic_ckpt.checkpoint.memory.tier import MemoryTier, Sealed
from elastic_ckpt.checkpoint.verify import verify_quick
from elastic_ckpt.errors import CheckpointError, CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import open_regular, remove_tree

CHUNK_BYTES: Final = 16 * 1024 * 1024
"""Copied between two looks at whether to go on; a multiple of every page's size."""


def is_on_disk(job: JobDirectory, seal: MemorySeal) -> bool:
    """Whether this very attempt stands there, sealed and with its sizes."""
    try:
        return verify_quick(job.checkpoint(seal.epoch, seal.step)).attempt == seal.attempt
    except (CheckpointError, OSError):
        return False


def drain(
    job: JobDirectory, sealed: Sealed, make_room: Callable[[], None]
) -> Generator[int, None, None]:
    """Copy a generation to the disk and seal it there; training goes on meanwhile.

    An iterator, so that who runs it may stop between two chunks, or hand it to another thread.
    Closing it early drops what was copied.

    Yields:
        Bytes copied since the last time.

    Raises:
        StorageFailed: there is no room.
        OSError: the disk said no.
        CheckpointRejected: the generation is not what its seal says.
    """
    seal = sealed.seal
    lock = sealed.generation.lock()
    try:
        if is_on_disk(job, seal):
            return
        ensure_space(job.root, seal.total_bytes, make_room)
        attempt = DiskAttempt.begin(job, seal.step, seal.attempt)
        try:
            files: list[FileEntry] = []
            for rank in range(seal.world_size):
                writer = attempt.part(rank)
                yield from _copy_part(sealed, writer)
                files += writer.finish(seal.world_size, header_of(seal) if rank == 0 else None)
            attempt.seal(header_of(seal), files)
        except BaseException:  # it was closed, too
            attempt.drop()
            raise
    finally:
        lock.release()


def _copy_part(sealed: Sealed, writer: DiskPart) -> Iterator[int]:
    for entry in sealed.seal.files:
        if entry.rank == writer.rank:
            source = sealed.generation.path / entry.path
            with writer.open(entry.path, entry.bytes, paged=True) as target:
                yield from _copy_file(source, entry, target)


def _copy_file(source: Path, entry: FileEntry, target: Sink) -> Iterator[int]:
    fd = open_regular(source)
    try:
        if os.fstat(fd).st_size != entry.bytes:
            raise CheckpointRejected(f"{entry.path} is not what the seal says")
        for offset in range(0, entry.bytes, CHUNK_BYTES):
            length = min(CHUNK_BYTES, entry.bytes - offset)
            # A window at a time, so that the copy is not counted as this process's memory.
            with closing(mmap.mmap(fd, length, prot=mmap.PROT_READ, offset=offset)) as window:
                target.write(window)
            yield length
    finally:
        os.close(fd)


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
