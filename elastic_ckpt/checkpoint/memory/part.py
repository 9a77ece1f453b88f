"""One rank's part of a generation: its files, into buffers that were written before."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from elastic_ckpt.checkpoint.manifest import FileEntry, SealHeader, check_path
from elastic_ckpt.checkpoint.memory.generation import NAME, Generation, ring
from elastic_ckpt.checkpoint.memory.mapped_file import MappedFile, Mappings, StreamedFile
from elastic_ckpt.checkpoint.memory.seal import MemorySeal, make_memory_seal
from elastic_ckpt.checkpoint.part_files import PartFiles
from elastic_ckpt.checkpoint.tier import Ref
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.policy.retention import Retention


class MemoryPart(PartFiles):
    """A part of a generation."""

    def __init__(self, generation: Generation, rank: int, mappings: Mappings) -> None:
        super().__init__(generation.path, rank)
        self._spare = generation.spare
        self._mappings = mappings

    def _create(self, path: str, size: int | None, paged: bool) -> MappedFile | StreamedFile:
        """Open a file in place of one that was here two saves ago, if there was one."""
        target = self._directory / path
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.path.lexists(target):
            raise FileExistsError(f"{path} was written already")
        with suppress(FileNotFoundError, NotADirectoryError):
            os.rename(self._spare / path, target)
        return self._mappings.open(target, size)

    def claim(self, path: str) -> None:
        check_path(path)
        found = os.lstat(self._directory / path)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise CheckpointRejected(f"{path} is not a regular file of its own")
        self._entries[path] = FileEntry(path, found.st_size, "", self.rank)

    def finish(self, world_size: int, header: SealHeader | None) -> list[FileEntry]:
        """Return the files; the drain writes part manifests."""
        self._mappings.forget_unused()
        return list(self._entries.values())


class MemoryAttempt:
    """One save into one generation. See :class:`elastic_ckpt.checkpoint.tier.Attempt`."""

    def __init__(self, generation: Generation, identity: str, mappings: Mappings) -> None:
        self._generation = generation
        self._mappings = mappings
        self._started = time.monotonic()
        self.ref = Ref(NAME, generation.slot.name, identity)

    @property
    def path(self) -> Path:
        return self._generation.path

    def part(self, rank: int) -> MemoryPart:
        return MemoryPart(self._generation, rank, self._mappings)

    def seal(self, header: SealHeader, files: Sequence[FileEntry], retention: Retention) -> Ref:
        """Seal it, and wake the supervisor, which drains the generation."""
        self._close(make_memory_seal(header, files, retention=retention, seconds=self._seconds))
        return self.ref

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _close(self, seal: MemorySeal) -> None:
        self._generation.close(seal)
        ring(self._generation.slot.parent)

    def drop(self) -> None:
        """Do nothing: it has no seal, and its buffers serve the next save."""
