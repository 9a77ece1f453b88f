"""What the parts of all tiers have in common: files, which belong to the part once written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from elastic_ckpt.checkpoint.disk.file_digest import Digest
from elastic_ckpt.checkpoint.manifest import FileEntry, check_path
from elastic_ckpt.checkpoint.tier import Sink


class PartFile(Sink, Protocol):
    """An open file. An error of a write stays in ``error``: not every caller lets it through."""

    @property
    def error(self) -> OSError | None:
        """The first error of a write."""

    def finish(self) -> Digest:
        """Make the contents as durable as the tier is; return their digests, if it has any."""

    def close(self) -> None:
        """Close; complete only after :meth:`finish`."""


class PartFiles(ABC):
    """Writes the files of one rank in one attempt, in ``directory``; any rank, any order."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory = directory
        self._entries: dict[str, FileEntry] = {}
        self.rank = rank

    @property
    def paths(self) -> list[str]:
        return list(self._entries)

    @contextmanager
    def open(
        self, path: str, size: int | None = None, *, paged: bool = False
    ) -> Iterator[PartFile]:
        check_path(path)
        file = self._create(path, size, paged)
        try:
            try:
                yield file
            finally:
                if file.error is not None:
                    raise file.error
            digest = file.finish()
        finally:
            file.close()
        self._entries[path] = digest.entry(path, self.rank)

    def write(self, path: str, data: bytes) -> None:
        with self.open(path) as file:
            file.write(data)

    @abstractmethod
    def _create(self, path: str, size: int | None, paged: bool) -> PartFile:
        """Create the file of a checked path; raises as :meth:`open`."""
