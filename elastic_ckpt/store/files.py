"""Durable file primitives: what is written here is on the disk when the call returns."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path
from typing import Final

import xxhash

from elastic_ckpt.core.manifest import FileEntry

_CHUNK: Final = 4 * 1024 * 1024


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_regular(path: Path) -> int:
    """Open a regular file for reading, without ever waiting for the other end of a FIFO.

    Raises:
        OSError: it is anything else (a link, a directory, a FIFO), or cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return fd


def sync_file(path: Path) -> None:
    """Make a file's contents durable, whoever wrote them."""
    fd = open_regular(path)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: a reader sees the old contents or the new ones.

    Durable on return. A kill leaves at most a ``.tmp-*`` file, which nobody reads.
    """
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def hash_file(path: Path) -> tuple[int, str]:
    """Size in bytes and xxh3_128 of a regular file; a link is refused with ``OSError``."""
    digest = xxhash.xxh3_128()
    size = 0
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
    return size, digest.hexdigest()


def seal_file(root: Path, path: str, rank: int) -> FileEntry:
    """Make one file durable and describe it."""
    sync_file(root / path)
    size, digest = hash_file(root / path)
    return FileEntry(path, size, digest, rank)


def files_below(root: Path) -> list[str]:
    """Relative paths, with ``/``, of everything that is no directory; links are not followed."""
    found: list[str] = []
    for directory, below, names in os.walk(root):
        base = os.path.relpath(directory, root)
        # os.walk lists a link to a directory among the directories and does not enter it
        links = [name for name in below if os.path.islink(os.path.join(directory, name))]
        found.extend(name if base == "." else f"{base}/{name}" for name in names + links)
    return sorted(found)


def sync_tree(root: Path) -> None:
    """Make the names in a directory and in all directories below it durable."""
    for directory, _, _ in os.walk(root, onerror=_raise):
        sync_directory(Path(directory))


def _raise(error: OSError) -> None:
    raise error
