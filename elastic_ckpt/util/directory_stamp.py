"""What tells whether the names in a directory have changed, by one call that asks the file server.

A network file system answers a plain ``stat`` from memory, for up to a minute on NFS. ``statx``
with ``AT_STATX_FORCE_SYNC`` does not; Python has no function for it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from pathlib import Path
from typing import Final, TypeAlias

Stamp: TypeAlias = tuple[int, ...]
"""Mount, device, inode, size, and the times of the last changes of names and of attributes."""

_AT_FDCWD: Final = -100
_FLAGS: Final = 0x100 | 0x2000
"""``AT_SYMLINK_NOFOLLOW``, ``AT_STATX_FORCE_SYNC``."""
_WANTED: Final = 0x17FF
"""``STATX_BASIC_STATS`` and, where the kernel knows it, ``STATX_MNT_ID``."""
_FOUND: Final = struct.Struct("=28xH2xQQ16x32xqI4xqI4x8xIIQ")
"""Of ``struct statx``: mode, inode, size, ctime, mtime, device, mount."""
_BYTES: Final = 256


def stamp_of(directory: Path) -> Stamp:
    """Return a directory's stamp: another one once a name in it was created, removed or replaced,
    or another directory is in its place. Two changes in the same tick of the file system's clock
    may have the same. A link is not followed.

    Raises:
        OSError: it is missing, or its storage does not answer.
    """
    statx = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
    if statx is None:  # an old C library
        return _opened(directory)
    found = ctypes.create_string_buffer(_BYTES)
    if statx(_AT_FDCWD, os.fsencode(directory), _FLAGS, _WANTED, found):
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EPERM, errno.EINVAL):  # forbidden by an old container
            return _opened(directory)
        raise OSError(code, os.strerror(code), str(directory))
    return _FOUND.unpack_from(found)


def _opened(directory: Path) -> Stamp:
    """Opening a directory asks the server as well; three calls."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(fd)
    finally:
        os.close(fd)
    return (
        found.st_mode, found.st_ino, found.st_size, found.st_ctime_ns, found.st_mtime_ns,
        found.st_dev,
    )  # fmt: skip
