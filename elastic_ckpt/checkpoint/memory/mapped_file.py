"""Files of the memory tier: made once, mapped once, written again and again.

The first touch of a page costs several times what a copy into it does. So a file is reused by
the next save, and its mapping stays in the process that wrote it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from elastic_ckpt.checkpoint.disk.file_digest import Digest

MAPPED_FROM_BYTES: Final = 64 * 1024
"""A smaller file is written with a system call; a mapping of it would cost more."""

_BLOCK: Final = 512  # what st_blocks counts


class MappedFile:
    """A file of known size, written from its beginning to its end through a mapping."""

    def __init__(self, fd: int, mapping: mmap.mmap) -> None:
        self._fd = fd
        self._view = memoryview(mapping)
        self._at = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Copy anything with a buffer to the next bytes, in one pass over memory; OSError (EFBIG)
        if that is more than expected."""
        source = memoryview(data).cast("B")
        self.take(len(source))[:] = source
        return len(source)

    def take(self, count: int) -> memoryview:
        """The next bytes, for the caller to fill; raises as :meth:`write`."""
        end = self._at + count
        if end > len(self._view):
            self.error = OSError(errno.EFBIG, "more was written than expected")
            raise self.error
        taken = self._view[self._at : end]
        self._at = end
        return taken

    def flush(self) -> None:
        """Do nothing; nothing is held back."""

    def finish(self) -> Digest:
        """Return the bytes written, without a digest; fewer than expected truncate the file."""
        if self._at < len(self._view):
            os.ftruncate(self._fd, self._at)
        return Digest(self._at, "")

    def close(self) -> None:
        """Close; the mapping stays for the next time."""
        self._view.release()
        os.close(self._fd)


class StreamedFile:
    """A file of unknown size. Has what ``torch.save`` asks of a file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Append anything with a buffer; all of it is written."""
        view = memoryview(data).cast("B")
        written = 0
        try:
            while written < len(view):
                written += os.pwrite(self._fd, view[written:], self._bytes + written)
        except OSError as error:
            self.error = error
            raise
        self._bytes += written
        return written

    def flush(self) -> None:
        """Do nothing; nothing is held back."""

    def finish(self) -> Digest:
        """Return the bytes written, without a digest; cut off what a longer file left."""
        os.ftruncate(self._fd, self._bytes)
        return Digest(self._bytes, "")

    def close(self) -> None:
        """Close."""
        os.close(self._fd)


OnMapping = Callable[[mmap.mmap], None]


class Mappings:
    """This process's mappings, by inode, so that a file which is written again stays mapped.
    Callers may follow each mapping, from its making until before it is closed."""

    def __init__(self, on_map: OnMapping = lambda _: None, on_unmap: OnMapping = lambda _: None):
        self._on_map = on_map
        self._on_unmap = on_unmap
        self._known: dict[int, tuple[mmap.mmap, int]] = {}
        self._used: set[int] = set()
        self._used_before: set[int] = set()

    def open(self, path: Path, size: int | None) -> MappedFile | StreamedFile:
        """Open a file to be written anew, with ``size`` bytes if that is known; its pages are kept.
        OSError if there is no memory (ENOSPC), or it is not our file."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                raise OSError(errno.ENXIO, "not a regular file of its own", str(path))
            if size is None or size < MAPPED_FROM_BYTES:
                return StreamedFile(fd)
            return MappedFile(fd, self._map(fd, found, size))
        except BaseException:
            os.close(fd)
            raise

    def forget_unused(self) -> None:
        """Unmap what was not written since the last call but one: two generations take turns."""
        for inode in set(self._known) - self._used - self._used_before:
            mapping, _ = self._known.pop(inode)
            self._on_unmap(mapping)
            with contextlib.suppress(BufferError):  # a view of it lives: it goes with that
                mapping.close()
        self._used, self._used_before = set(), self._used

    def _map(self, fd: int, found: os.stat_result, size: int) -> mmap.mmap:
        self._used.add(found.st_ino)
        if found.st_size != size:
            os.ftruncate(fd, size)
        if found.st_blocks * _BLOCK < size:
            # A store to a page that a full tmpfs cannot give is a SIGBUS; this is an ENOSPC.
            os.posix_fallocate(fd, 0, size)
        mapping, mapped = self._known.pop(found.st_ino, (None, 0))
        if mapping is None or mapped != size:
            if mapping is not None:
                self._on_unmap(mapping)
            mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            self._on_map(mapping)
        self._known[found.st_ino] = mapping, size
        return mapping
