"""Durable file primitives: what is written here is on the disk when the call returns.

What is made here can be read by its owner alone, or by the group too where the directory that it
is made in lets the group in: so one ``chmod`` of the job's directories decides for all of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MAX_DEPTH: Final = 64
"""Directories within directories; a checkpoint has two or three."""

_GROUP: Final = stat.S_IRGRP | stat.S_IXGRP


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
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ENXIO, "no regular file", str(path))
    return fd


def read_tail(path: Path, limit: int) -> bytes:
    """The end of a regular file, so many bytes at the most; nothing if it cannot be read."""
    if limit <= 0:
        return b""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - limit))
            return file.read(min(size, limit))  # Python makes room for all that it is asked
    except OSError:
        return b""


def read_bounded(path: Path, limit: int) -> bytes:
    """A small file that somebody else may have put there.

    Raises:
        OSError: it is no regular file, cannot be read, or is larger than ``limit`` bytes.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(size + 1)  # it may grow
    if max(size, len(data)) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", str(path))
    return data


def create_file(path: Path) -> int:
    """Open a new file for writing.

    Raises:
        OSError: the name is taken, by a link too, or the disk says no.
    """
    shared = group_may_read(path.parent)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    if shared:
        try:
            set_mode(fd, 0o640)  # the umask may have taken it away
        except OSError:
            os.close(fd)
            path.unlink()
            raise
    return fd


def create_directory(path: Path) -> None:
    """Make one directory, whose parent exists; the name must be free."""
    os.mkdir(path, 0o700)
    if group_may_read(path.parent):
        let_group_in(path)


def let_group_in(directory: Path) -> None:
    """Let the group list and read a directory; its other bits, setgid above all, stay."""
    set_mode(directory, stat.S_IMODE(os.stat(directory).st_mode) | _GROUP)


def set_mode(place: int | Path, mode: int) -> None:
    """``chmod`` for what is ours; a file system that has no modes is no error."""
    try:
        os.chmod(place, mode)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def group_may_read(directory: Path) -> bool:
    """Whether a directory lets the group in, and so what is made in it does, too."""
    return os.stat(directory).st_mode & _GROUP == _GROUP


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: a reader sees the old contents or the new ones.

    One writer per path. Durable on return. A kill leaves at most one ``.tmp-`` file beside it,
    which nobody reads and the next write replaces.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        fd = create_file(temporary)
    except FileExistsError:
        temporary.unlink()
        fd = create_file(temporary)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def remove_temporaries(directory: Path) -> None:
    """Remove what a kill left in a directory that has no writer now.

    What is no file was not left by us, and must not keep a job from starting.
    """
    if directory.is_symlink():
        return
    for path in directory.glob(".tmp-*"):
        with contextlib.suppress(OSError):
            path.unlink()


def remove_tree(directory: Path | str) -> None:
    """Delete a directory and all that is in it; what cannot be deleted now is left.

    Links are removed and not followed.
    """
    # Before Python 3.13 it calls itself for every level.
    with contextlib.suppress(OSError, RecursionError):
        shutil.rmtree(directory, ignore_errors=True)


def files_below(root: Path) -> list[str]:
    """Relative paths, with ``/``, of everything that is no directory; links are not followed.

    Raises:
        OSError: a directory could not be read, and what is in it must not pass for nothing; or
            directories are nested too deeply (ELOOP).
    """
    found: list[str] = []
    for directory, names in _walk(root):
        base = os.path.relpath(directory, root)
        found.extend(name if base == "." else f"{base}/{name}" for name in names)
    return sorted(found)


def sync_tree(root: Path) -> None:
    """Make the names in a directory and in all directories below it durable.

    Directories that other code made in it get the mode of our own, whatever the umask was.
    """
    wanted = 0o750 if group_may_read(root) else 0o700
    for directory, _ in _walk(root):
        mode = stat.S_IMODE(os.stat(directory).st_mode)
        if directory != root and mode & 0o777 != wanted:
            set_mode(directory, mode & stat.S_ISGID | wanted)
        sync_directory(directory)


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """A directory and all below it, with the names of what is no directory.

    Unlike os.walk it takes a link for no directory, and does not call itself for each level.
    """
    waiting = [(root, 0)]
    while waiting:
        directory, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise OSError(errno.ELOOP, f"nested deeper than {MAX_DEPTH} directories", str(root))
        names: list[str] = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((Path(entry.path), depth + 1))
                else:
                    names.append(entry.name)
        yield directory, names
