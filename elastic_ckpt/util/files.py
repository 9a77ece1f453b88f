"""Durable file primitives: data is on the disk when the call returns.

Files and directories created here are readable by their owner only, and by the group if the
directory above is: so one ``chmod`` of the job's directories decides for all of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

TEMPORARY: Final = ".tmp-"
"""Begins the names of files that are written, and then take another's place. Never read."""

MAX_DEPTH: Final = 64
"""Maximum depth of nested directories; a checkpoint has two or three."""

_NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK})
_GROUP: Final = stat.S_IRGRP | stat.S_IXGRP


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_regular(path: Path) -> int:
    """Open a regular file for reading, without waiting for the other end of a FIFO. OSError for
    anything else (a link, a directory, a FIFO), or if it cannot be opened."""
    return _open_regular(path)[0]


def _open_regular(path: Path) -> tuple[int, os.stat_result]:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise OSError(errno.ENXIO, "not a regular file", str(path))
    return fd, status


def read_tail(path: Path, limit: int) -> bytes:
    """Return the last ``limit`` bytes of a regular file; nothing if it cannot be read."""
    if limit <= 0:
        return b""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - limit))
            return file.read(min(size, limit))  # Python allocates all that it is asked for
    except OSError:
        return b""


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the contents of a small file that another user may have created. OSError if it is not
    a regular file, cannot be read, or is larger than ``limit`` bytes."""
    return read_with_time(path, limit)[0]


def read_with_time(path: Path, limit: int) -> tuple[bytes, float]:
    """Return what :func:`read_bounded` does and when the file was written, in seconds since 1970.
    Four system calls, as each may cost a way over the network."""
    fd, status = _open_regular(path)
    try:
        data = b""
        # At the end of a regular file a read is short. One byte more: the file may grow.
        while status.st_size <= limit and len(data) <= status.st_size:
            wanted = status.st_size + 1 - len(data)
            piece = os.read(fd, wanted)
            data += piece
            if not piece or len(data) == status.st_size:
                break
    finally:
        os.close(fd)
    if max(status.st_size, len(data)) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", str(path))
    return data, status.st_mtime


def create_file(path: Path, *, shared: bool | None = None) -> int:
    """Open a new file for writing; OSError if the name exists, even as a link. ``shared``: whether
    the group may read the directory, if the caller knows it."""
    if shared is None:
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


def create_directory(path: Path, *, shared: bool | None = None) -> None:
    """Create a directory in an existing one; the name must be free. ``shared`` as for
    :func:`create_file`."""
    os.mkdir(path, 0o700)
    if group_may_read(path.parent) if shared is None else shared:
        let_group_in(path)


def let_group_in(directory: Path) -> None:
    """Let the group list and read a directory; keep its other bits, such as setgid."""
    set_mode(directory, stat.S_IMODE(os.stat(directory).st_mode) | _GROUP)


def set_mode(place: int | Path, mode: int) -> None:
    """``chmod`` a path of ours, if the file system has modes."""
    try:
        os.chmod(place, mode)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def group_may_read(directory: Path) -> bool:
    """Whether the group may read a directory, and so what is created in it."""
    return os.stat(directory).st_mode & _GROUP == _GROUP


def write_new(path: Path, data: bytes, *, shared: bool | None = None) -> None:
    """Write a new file: its contents are durable on return, its name once its directory is synced.
    OSError if the name exists. A kill leaves a part of it. ``shared`` as for :func:`create_file`.
    """
    fd = create_file(path, shared=shared)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes, *, shared: bool | None = None) -> None:
    """Replace ``path`` with ``data``: a reader sees the old contents or the new ones.

    One writer per path. Durable on return. A kill leaves at most one ``.tmp-`` file next to it,
    which is never read and which the next write replaces. ``shared`` as for :func:`create_file`.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        try:
            write_new(temporary, data, shared=shared)
        except FileExistsError:
            temporary.unlink()
            write_new(temporary, data, shared=shared)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_shared(path: Path, data: bytes, *, replaces: bool = False) -> None:
    """Create ``path`` with ``data`` as one of several writers; FileExistsError if another was first
    and this one does not ``replace`` it. Durable on return. Where there are no hard links the last
    one wins. A kill leaves at most a ``.tmp-`` file, which is never read.
    """
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        write_new(temporary, data)
        if replaces or not _try_link(temporary, path):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def _try_link(source: Path, target: Path) -> bool:
    """Give a file a second name, which must be free; return False where there are no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


def write_record(path: Path, data: bytes) -> None:
    """As :func:`write_atomic`; on a full disk overwrite the file, if it has room for ``data``.

    For what must be recorded above all. Trailing spaces fill the rest.
    """
    try:
        write_atomic(path, data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_blocks * 512 < len(data):
                raise
            os.pwrite(fd, data.ljust(found.st_size), 0)
            os.fsync(fd)
        finally:
            os.close(fd)


def allocate_ahead(fd: int, size: int, count: int) -> None:
    """Allocate ``count`` bytes beyond a file's ``size``, which stays: a full disk takes them later.

    Raises:
        OSError: there is no room, or the file system cannot do it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, 1, ctypes.c_int64(size), ctypes.c_int64(count)):  # 1: FALLOC_FL_KEEP_SIZE
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def remove_temporaries(directory: Path) -> None:
    """Remove temporary files that a kill left in a directory without a writer. Anything else of
    that name is not ours, and must not keep a job from starting."""
    if directory.is_symlink():
        return
    for path in directory.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            path.unlink()


def remove_tree(directory: Path | str) -> None:
    """Delete a directory tree as far as possible; links are removed, not followed."""
    # Before Python 3.13 rmtree recurses for every level.
    with contextlib.suppress(OSError, RecursionError):
        shutil.rmtree(directory, ignore_errors=True)


def files_below(root: Path) -> list[str]:
    """Return the relative paths, with ``/``, of all but directories; links are not followed.
    OSError if one cannot be read, or if they are nested too deeply (ELOOP)."""
    found: list[str] = []
    for directory, names in _walk(root):
        base = os.path.relpath(directory, root)
        found.extend(name if base == "." else f"{base}/{name}" for name in names)
    return sorted(found)


def sync_tree(root: Path) -> None:
    """Make the names in a directory and in all below it durable; those that other code created get
    the mode of ours, whatever the umask."""
    wanted = 0o750 if group_may_read(root) else 0o700
    for directory, _ in _walk(root):
        mode = stat.S_IMODE(os.stat(directory).st_mode)
        if directory != root and mode & 0o777 != wanted:
            set_mode(directory, mode & stat.S_ISGID | wanted)
        sync_directory(directory)


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield a directory and all below it, each with the names of its other entries. Unlike os.walk
    it treats a link as a file, and does not recurse."""
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
