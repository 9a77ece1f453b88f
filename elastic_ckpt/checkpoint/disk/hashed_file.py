"""Digests of files: on the way to the disk, and in a pass of their own before a load.

Writing and hashing run in parallel: the hash works on a buffer while the kernel takes it. Both
release Python's lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import local
from typing import Any, Final

import xxhash

from elastic_ckpt.checkpoint.disk.file_digest import BLOCK_BYTES, Digest, FileDigest
from elastic_ckpt.util.files import create_file, open_regular
from elastic_ckpt.util.progress import Advance, ignore

LARGE_BYTES: Final = 8 * 1024 * 1024
"""From here on a second thread is worth its while."""

PAGE_BYTES: Final = 4096

_own = local()


class HashedFile:
    """A new file of :class:`DiskPart`; what is written to it is hashed on the way. Has what
    ``torch.save`` asks of a file. If ``direct``, writes of whole pages bypass the page cache."""

    def __init__(self, path: Path, direct_bytes: int = 0, *, shared: bool | None = None) -> None:
        """Create it, for ``direct_bytes`` past the page cache: whole pages at addresses of pages,
        the end excepted; 0 for the usual way. ``shared`` as for ``create_file``."""
        self._fd = create_file(path, shared=shared)
        self.direct = direct_bytes >= LARGE_BYTES and _write_directly(self._fd, direct_bytes)
        self._reserved = direct_bytes if self.direct else 0
        self._digest = FileDigest()
        self._bytes = 0
        self._helper: ThreadPoolExecutor | None = None
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Append anything with a buffer; all of it is written."""
        view = memoryview(data).cast("B")
        hashed: Future[None] | None = None
        if len(view) >= LARGE_BYTES:
            self._helper = self._helper or ThreadPoolExecutor(1, "hash")
            hashed = self._helper.submit(self._digest.update, view)
        else:
            self._digest.update(view)
        if self.direct and len(view) % PAGE_BYTES:
            _write_usually(self._fd)
            self.direct = False
        try:
            written = 0
            while written < len(view):
                written += os.write(self._fd, view[written:])
        except OSError as error:
            self.error = error
            raise
        finally:
            if hashed is not None:
                hashed.result()  # the caller may reuse its buffer then
        self._bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""

    def sync(self) -> None:
        """Make the contents durable."""
        if self._bytes < self._reserved:
            os.ftruncate(self._fd, self._bytes)
        os.fsync(self._fd)

    def finish(self) -> Digest:
        """Make the contents durable; return their digests."""
        self.sync()
        return self._digest.finish()

    def close(self) -> None:
        """Close; durable only after :meth:`sync`."""
        if self._helper is not None:
            self._helper.shutdown()
        os.close(self._fd)


def _write_directly(fd: int, size: int) -> bool:
    """Whether writes now pass the page cache by, into blocks that are reserved."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return False  # a file system that knows nothing of it
    # glibc would write into each block itself where the file system cannot reserve, which fails
    # at once on such a descriptor.
    with contextlib.suppress(OSError):
        os.posix_fallocate(fd, 0, size)
    return True


def _write_usually(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


def hash_file(path: Path, advance: Advance = ignore) -> tuple[int, str]:
    """Return size in bytes and xxh3_128 of a regular file; a link is an OSError."""
    digest = xxhash.xxh3_128()
    return _read(path, digest.update, advance), digest.hexdigest()


def digest_file(path: Path, advance: Advance = ignore) -> Digest:
    """Return what a manifest says of a regular file; a link is an OSError."""
    digest = FileDigest()
    _read(path, digest.update, advance)
    return digest.finish()


def _read(path: Path, update: Callable[[memoryview], object], advance: Advance) -> int:
    """Read a file in blocks of ``BLOCK_BYTES``, and return its size: what is hashed a moment later
    still lies in the cache of the core. A thread for the reads and one for the hash are no faster,
    as each byte then passes between two cores."""
    size, buffer = 0, _buffer()
    with open(open_regular(path), "rb") as file:
        expected = os.fstat(file.fileno()).st_size
        # A file that grows is not read to its end: who writes to it could keep us for ever.
        while size <= expected and (count := os.readv(file.fileno(), [buffer])):
            update(buffer[:count])
            size += count
            advance(count)
    return size


def _buffer() -> memoryview:
    """This thread's own; making one costs more than filling it."""
    if not hasattr(_own, "buffer"):
        _own.buffer = memoryview(bytearray(BLOCK_BYTES))
    found: memoryview = _own.buffer
    return found


STAGE_BYTES: Final = 4 * 1024 * 1024
"""Of each of the two buffers; a multiple of every page's size."""


class StagedFile:
    """Fills one buffer of whole pages while another is hashed and written to ``file``, directly:
    that needs whole pages at the address of a page, which no tensor offers."""

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
        """Append anything with a buffer, which the caller may reuse afterwards. OSError is of this
        write or of an earlier one."""
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
        """What is held back is written by :meth:`finish`."""

    def finish(self) -> Digest:
        """As :meth:`HashedFile.finish`; raises as :meth:`write`."""
        self._hand_over()
        self._wait()
        return self._file.finish()

    def close(self) -> None:
        """Close; durable only after :meth:`finish`."""
        self._writer.shutdown()
        self._file.close()

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
