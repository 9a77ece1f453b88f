"""One rank's part of a generation: its files, into buffers that were written before."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from elastic_ckpt.checkpoint.manifest import FileEntry, SealHeader, check_path
from elastic_ckpt.checkpoint.memory.generation import NAME, Generation
from elastic_ckpt.checkpoint.memory.mapped_file import MappedFile, Mappings, StreamedFile
from elastic_ckpt.checkpoint.tier import Ref
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.policy.retention import Retention


class MemoryPart:
    """Writes one rank's files of one generation. Not collective; any rank, any order."""

    def __init__(self, generation: Generation, rank: int, mappings: Mappings) -> None:
        self._generation = generation
        self._mappings = mappings
        self._entries: dict[str, FileEntry] = {}
        self.rank = rank

    @property
    def paths(self) -> list[str]:
        """The files that are in this part, relative to the generation's state."""
        return list(self._entries)

    @contextmanager
    def open(
        self, path: str, size: int | None = None, *, paged: bool = False
    ) -> Iterator[MappedFile | StreamedFile]:
        """A new file of this part, in place of one that was here two saves ago if there was one.

        Args:
            path: relative; directories that are missing are made.
            size: bytes that will be written, which makes the write a single copy.

        Raises:
            OSError: the file exists, or there is no memory.
        """
        check_path(path)
        target = self._generation.path / path
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._reuse(path, target)
        file = self._mappings.open(target, size)
        try:
            try:
                yield file
            finally:
                if file.error is not None:
                    raise file.error
            written = file.finish()
        finally:
            file.close()
        self._entries[path] = FileEntry(path, written, "", self.rank)

    def write(self, path: str, data: bytes) -> None:
        """A small file; raises as :meth:`open`."""
        with self.open(path) as file:
            file.write(data)

    def claim(self, path: str) -> None:
        """Add a file that other code has written to this part.

        Raises:
            CheckpointRejected: it is not a regular file, or has another name.
        """
        check_path(path)
        found = os.lstat(self._generation.path / path)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise CheckpointRejected(f"{path} is not a regular file of its own")
        self._entries[path] = FileEntry(path, found.st_size, "", self.rank)

    def finish(self, world_size: int, header: SealHeader | None) -> list[FileEntry]:
        """The part's files, for the leader's seal; part manifests are the drain's to write."""
        self._mappings.forget_unused()
        return list(self._entries.values())

    def _reuse(self, path: str, target: Path) -> None:
        if os.path.lexists(target):
            raise FileExistsError(f"{path} was written already")
        with suppress(FileNotFoundError, NotADirectoryError):
            os.rename(self._generation.spare / path, target)


class MemoryAttempt:
    """One save into one generation. See :class:`elastic_ckpt.checkpoint.tier.Attempt`."""

    def __init__(self, generation: Generation, identity: str, mappings: Mappings) -> None:
        self._generation = generation
        self._mappings = mappings
        self._started = time.monotonic()
        self.ref = Ref(NAME, generation.slot.name, identity)

    @property
    def path(self) -> Path:
        """See the protocol."""
        return self._generation.path

    def part(self, rank: int) -> MemoryPart:
        """See the protocol."""
        return MemoryPart(self._generation, rank, self._mappings)

    def seal(self, header: SealHeader, files: Sequence[FileEntry], retention: Retention) -> Ref:
        """See the protocol; it wakes the supervisor, which drains the generation."""
        self._generation.close(header, files, time.monotonic() - self._started, retention)
        _ring(self._generation.slot.parent)
        return self.ref

    def drop(self) -> None:
        """See the protocol; it has no seal, and its buffers serve the next save."""


def _ring(root: Path) -> None:
    """Wake the supervisor: something was sealed."""
    with suppress(OSError):
        fd = os.open(root / "bell", os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            os.write(fd, b"x")
        finally:
            os.close(fd)
