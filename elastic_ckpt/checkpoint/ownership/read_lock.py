"""A checkpoint that is open is not deleted: a shared lock on its own manifest.

The kernel holds it (flock), so that a killed reader blocks no one. filelock has no shared mode
that works in a directory that the reader may not write to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.verify import MANIFEST_NAME
from elastic_ckpt.errors import CheckpointRejected

_PATIENCE_SECONDS: Final = 2.0
"""A removal holds its lock for a moment; it may fail, and then the checkpoint stays."""

NO_LOCKS: Final = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
"""A file system without locks: readers continue, and nothing is deleted there."""


class BeingRemoved(CheckpointRejected):
    """It was removed, or another process locks it. The checkpoint itself is not bad."""


class ReadLock:
    """Keeps a checkpoint from being deleted until it is released, or this process ends."""

    def __init__(self, checkpoint: Path, seal: str = MANIFEST_NAME) -> None:
        """Lock the file ``seal``; waits at most for a removal in progress. BeingRemoved if the
        checkpoint is being removed or gone, OSError if its seal cannot be opened."""
        manifest = checkpoint / seal
        gone = BeingRemoved(f"{checkpoint.name} is being removed")
        try:
            self._fd = os.open(manifest, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
        except FileNotFoundError:
            raise gone from None
        try:
            _lock_patiently(self._fd, manifest)
            # It may have been renamed away between the two calls.
            if not _is_still(self._fd, manifest):
                raise gone
        except (BlockingIOError, FileNotFoundError):
            self.release()
            raise gone from None
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Allow its deletion. A repeat does nothing."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # a child that was forked meanwhile holds it, too
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1


@contextlib.contextmanager
def removing(checkpoint: Path, seal: str = MANIFEST_NAME) -> Iterator[str]:
    """Keep readers out while a checkpoint is renamed away, or a generation loses its seal. Yields
    why it must stay, if so; OSError if it is gone, or not this user's to remove."""
    # Network file systems grant an exclusive lock only with write access.
    manifest = checkpoint / seal
    fd = os.open(manifest, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        why = _why_it_stays(fd)
        if not why and not _is_still(fd, manifest):
            why = "it is another one by now"
        yield why
    finally:
        os.close(fd)


def _is_still(fd: int, path: Path) -> bool:
    return os.path.samestat(os.fstat(fd), os.lstat(path))


def _lock_patiently(fd: int, path: Path) -> None:
    limit = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            _lock(fd, fcntl.LOCK_SH)
            return
        except BlockingIOError:
            if time.monotonic() > limit or not _is_still(fd, path):
                raise
        time.sleep(0.005)


def _why_it_stays(fd: int) -> str:
    try:
        known = _lock(fd, fcntl.LOCK_EX)
    except BlockingIOError:
        return "it is open"
    return "" if known else "the file system has no locks: it may be open"


def _lock(fd: int, kind: int) -> bool:
    """Return whether the file system has locks; BlockingIOError if the other kind is held."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True
