"""Whose a memory tier is, and the lock of the run that uses it.

The place is shared (``/dev/shm``), and what lies there is hostile input: another user may take any
name, and a killed or an older process may have left anything below our own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import read_bounded

OWNER_NAME: Final = "owner.json"

_PREFIX: Final = "elastic-ckpt-"
_MAX_BYTES: Final = 64 * 1024
_PATIENCE_SECONDS: Final = 0.5
"""Time for ``status`` or ``doctor`` to let go of a tier that they look at."""


class TierOwner(msgspec.Struct, frozen=True):
    """The job of a memory tier.

    Attributes:
        root: its directory at the last run, for people and to tell a copy from a job that moved.
        identity: what stands in that directory; it is what a tier is found by.
        node: where it ran last, for people.
    """

    root: str
    identity: str
    node: str = ""


def tier_path(place: Path, job: JobDirectory) -> Path:
    """Return where a job's tier is, on whatever node: the same for each run of this directory."""
    name = hashlib.sha256(f"{job.root}\0{job.identity()}".encode()).hexdigest()[:16]
    return place / f"{_PREFIX}{os.getuid()}-{name}"


def tiers_in(place: Path) -> Iterator[Path]:
    """Yield this user's tiers, whosever and in whatever state; none if the place is unreadable."""
    with contextlib.suppress(OSError):
        yield from filter(is_tier, sorted(place.glob(f"{_PREFIX}{os.getuid()}-*")))


def is_tier(root: Path) -> bool:
    """Return whether a path has a tier's name, and is a directory that is for this user alone."""
    return root.name.startswith(f"{_PREFIX}{os.getuid()}-") and is_private(root)


def is_private(root: Path) -> bool:
    """Return whether a path is a directory that belongs to this user and admits no other."""
    try:
        found = os.lstat(root)
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.getuid()
        and stat.S_IMODE(found.st_mode) == 0o700
    )


def read_tier_owner(root: Path) -> TierOwner | None:
    """Return whose a tier is; None if its record is missing or damaged."""
    try:
        return msgspec.json.decode(read_bounded(root / OWNER_NAME, _MAX_BYTES), type=TierOwner)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return None


def write_tier_owner(fd: int, owner: TierOwner) -> None:
    """Replace the record in one write: the lock is on this very file, and a kill may come."""
    size = os.fstat(fd).st_size
    if size > _MAX_BYTES:  # no record of ours
        os.ftruncate(fd, 0)
        size = 0
    os.pwrite(fd, msgspec.json.encode(owner).ljust(size), 0)


def hold_tier(root: Path, *, create: bool = False) -> int:
    """Lock a tier for this process; return the descriptor, which holds the lock until closed.

    Raises:
        BlockingIOError: a run holds it.
        OSError: it has no record (FileNotFoundError), or cannot be opened.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0)
    fd = os.open(root / OWNER_NAME, flags, 0o600)
    limit = time.monotonic() + _PATIENCE_SECONDS
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ENXIO, "its record is not a regular file")
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > limit:
                    raise
            time.sleep(0.01)
        # It may have been removed while this process waited.
        if not os.path.samestat(os.fstat(fd), os.lstat(root / OWNER_NAME)):
            raise BlockingIOError
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_held(root: Path) -> bool:
    """Return whether a run uses a tier; whoever asks keeps no other from taking it."""
    try:
        fd = os.open(root / OWNER_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False
