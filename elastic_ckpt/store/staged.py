"""A new file past the page cache, from memory at any address."""

from __future__ import annotations

import mmap
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

from elastic_ckpt.checkpoint.manifest import FileEntry
from elastic_ckpt.checkpoint.hashed_file import HashedFile

STAGE_BYTES: Final = 4 * 1024 * 1024
"""Of each of the two buffers; a multiple of every page's size."""


class StagedFile:
    """Fills one buffer of whole pages while another is hashed and written.

    What a direct write asks for, whole pages at the address of a page, no tensor offers.

    Args:
        file: made for direct writes; it is closed with this one.
    """

    def __init__(self, file: HashedFile) -> None:
        self._file = file
        self._buffers = [memoryview(mmap.mmap(-1, STAGE_BYTES)) for _ in range(2)]
        self._filled = 0
        self._writer = ThreadPoolExecutor(1, "write")
        self._writing: Future[int] | None = None

    @property
    def error(self) -> OSError | None:
        """As :class:`HashedFile` has it."""
        return self._file.error

    def write(self, data: Any) -> int:
        """Append anything with a buffer, which the caller may reuse afterwards.

        Raises:
            OSError: the disk said no, to this or to what came before.
        """
        source = memoryview(data).cast("B")
        rest = source
        while rest:
            piece = rest[: STAGE_BYTES - self._filled]
            self._buffers[0][self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            rest = rest[len(piece) :]
            if self._filled == STAGE_BYTES:
                self._hand_over()
        return len(source)

    def flush(self) -> None:
        """What is held back is written by :meth:`sync`."""

    def sync(self) -> None:
        """Make the contents durable; raises as :meth:`write`."""
        self._hand_over()
        self._wait()
        self._file.sync()

    def close(self) -> None:
        """Close; durable only after :meth:`sync`."""
        self._writer.shutdown()
        self._file.close()

    def entry(self, path: str, rank: int) -> FileEntry:
        """What was written, as the manifest lists it."""
        return self._file.entry(path, rank)

    def _hand_over(self) -> None:
        self._wait()
        full = self._buffers[0][: self._filled]
        self._writing = self._writer.submit(self._file.write, full)
        self._buffers.reverse()
        self._filled = 0

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()
