"""Durable file primitives: what is written here is on the disk when the call returns."""

from __future__ import annotations

import contextlib
import os
import secrets
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


def sync_file(path: Path) -> None:
    """Make a file's contents durable, whoever wrote them."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
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
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(fd, "rb", buffering=0) as file:
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
    for directory, _, names in os.walk(root):
        base = os.path.relpath(directory, root)
        found.extend(name if base == "." else f"{base}/{name}" for name in names)
        # os.walk lists a link to a directory among the directories and does not enter it
        found.extend(
            os.path.normpath(os.path.join(base, name))
            for name in _
            if os.path.islink(os.path.join(directory, name))
        )
    return sorted(found)


def sync_tree(root: Path) -> None:
    """Make the names in a directory and in all directories below it durable."""
    for directory, _, _ in os.walk(root):
        sync_directory(Path(directory))
