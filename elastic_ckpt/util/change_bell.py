"""Rings when a process of this host changes something in a directory: inotify.

Asking it is no call to the file system. What other hosts change in a shared directory it does not
notice, so it only saves looks; it replaces none.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from pathlib import Path
from typing import Final

_CHANGES: Final = 0x2 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800
"""IN_MODIFY, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF."""
_ONLY_THIS: Final = 0x1000000 | 0x2000000
"""IN_ONLYDIR, IN_DONT_FOLLOW."""
_GONE: Final = 0x800 | 0x2000 | 0x8000
"""IN_MOVE_SELF, IN_UNMOUNT, IN_IGNORED: another directory may be at the path."""
_EVENT: Final = struct.Struct("=iIII")
_READ_BYTES: Final = 64 * 1024


class ChangeBell:
    """The bell of one directory; one thread calls all methods.

    Attributes:
        is_on: whether changes by this host ring it; False where the kernel has no inotify or this
            user has too many, or while the directory is missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = -1
        self.is_on = False
        with contextlib.suppress(AttributeError):
            self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self.hang()

    def hang(self) -> None:
        """Ring for the directory that is at the path now: another one may have taken its place."""
        path = os.fsencode(self._directory)
        self.is_on = (
            self._fd >= 0
            and self._libc.inotify_add_watch(self._fd, path, _CHANGES | _ONLY_THIS) >= 0
        )

    def rang(self) -> bool:
        """Return whether something has changed since the last call, or may have."""
        if not self.is_on:
            self.hang()
            return True
        events = b""
        with contextlib.suppress(BlockingIOError):
            events = os.read(self._fd, _READ_BYTES)  # whole ones; the rest rings the next time
        start = 0
        while start < len(events):
            _, mask, _, length = _EVENT.unpack_from(events, start)
            start += _EVENT.size + length
            if mask & _GONE:
                self.is_on = False
        return bool(events)

    def close(self) -> None:
        """Take it down. A repeat does nothing."""
        self.is_on = False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
