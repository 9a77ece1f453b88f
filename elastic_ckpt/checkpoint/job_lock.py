"""Who may write: one supervisor per node, one run per job.

The kernel holds the lock (filelock, on flock), so that a killed owner never blocks anybody. Where
the file system knows no locks, filelock's marker file stands in; it names host, pid and start, and
a marker whose owner is provably gone is taken over. Who holds a lock, for people, stands in a file
beside it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import filelock
import msgspec

from elastic_ckpt.checkpoint.read_lock import NO_LOCKS
from elastic_ckpt.errors import DirectoryUnusable, LockHeld
from elastic_ckpt.jobdir.node_record import ProcessIdentity
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import read_bounded, write_atomic
from elastic_ckpt.util.text import printable

_TAKE_OVER_SECONDS: Final = 0.5
"""Time to find that a marker's owner has died, and to take its place."""


class LockOwner(msgspec.Struct, frozen=True):
    """The holder of a lock, as it wrote itself into the lock file."""

    run_id: str
    incarnation: int
    owner: ProcessIdentity


class HeldLock:
    """A lock that this process holds until it ends or calls :meth:`release`."""

    def __init__(self, path: Path, run_id: str) -> None:
        """Take the lock, without waiting. LockHeld, which names pid and host, if another process
        holds it; DirectoryUnusable if the file system refuses."""
        self._path = path
        self._run_id = run_id
        try:
            self._lock = _acquire(path)
        except filelock.Timeout:
            raise LockHeld(f"{path} is held by {_describe(path)}") from None
        except OSError as error:
            raise DirectoryUnusable(
                f"cannot lock {path}: {error.strerror or error}; choose another directory"
            ) from None
        try:
            self.record(0)
        except OSError as error:
            self._lock.release()
            raise DirectoryUnusable(
                f"cannot write {_owner_file(path)}: {error.strerror or error}; make room there, or "
                "choose another directory"
            ) from None

    def record(self, incarnation: int) -> None:
        """Write who holds the lock, and for which incarnation."""
        owner = LockOwner(self._run_id, incarnation, ProcessIdentity.current())
        write_atomic(_owner_file(self._path), msgspec.json.encode(owner))

    def release(self) -> None:
        """Release the lock. The lock file stays: removing it would admit two holders."""
        with contextlib.suppress(OSError):
            _owner_file(self._path).unlink(missing_ok=True)
        self._lock.release()


class RunLocks:
    """The locks of one supervisor: its node's, and on the node of group rank 0 the job's. Other
    nodes of the run are admitted by their own locks."""

    def __init__(self, job: JobDirectory, node: str, run_id: str, *, leads: bool = True) -> None:
        """Take them; raises as :class:`HeldLock`."""
        self._node = HeldLock(job.node_lock(node), run_id)
        self._job: HeldLock | None = None
        try:
            if leads:
                self._job = HeldLock(job.lock, run_id)
        except BaseException:
            self._node.release()
            raise

    def record(self, incarnation: int) -> None:
        """Write, for people, which incarnation may seal; a full disk must not end the run."""
        with contextlib.suppress(OSError):
            if self._job is not None:
                self._job.record(incarnation)

    def release(self) -> None:
        """Release them."""
        if self._job is not None:
            self._job.release()
        self._node.release()


def read_owner(path: Path) -> LockOwner | None:
    """Return who holds, or last held, a lock."""
    try:
        found = msgspec.json.decode(read_bounded(_owner_file(path), 64 * 1024), type=LockOwner)
        host = printable(found.owner.host)
        owner = msgspec.structs.replace(found.owner, host=host)
        return LockOwner(printable(found.run_id), found.incarnation, owner)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _acquire(path: Path) -> filelock.BaseFileLock:
    # Its own way out for ENOSYS alone puts the marker into the lock file, which may be there.
    native = filelock.FileLock(
        path, timeout=0, thread_local=False, mode=0o600, fallback_to_soft=False
    )
    try:
        native.acquire()
        return native
    except OSError as error:
        if isinstance(error, filelock.Timeout) or error.errno not in NO_LOCKS:
            raise
    marker = filelock.SoftFileLock(
        _marker(path), timeout=_TAKE_OVER_SECONDS, thread_local=False, mode=0o600
    )
    marker.acquire()
    return marker


def _owner_file(path: Path) -> Path:
    return path.with_name(path.name + ".owner")


def _marker(path: Path) -> Path:
    return path.with_name(path.name + ".marker")


def _describe(path: Path) -> str:
    found = read_owner(path)
    if found is None:
        return "another process"
    owner = f"pid {found.owner.pid} on {found.owner.host} (run {found.run_id})"
    if found.owner.is_alive() is False:
        return f"a process that {owner} left behind: end that one first"
    stop = f"{owner}: stop that one first, or choose another --dir"
    if found.owner.is_alive() is None and _marker(path).exists():
        return f"{stop}; if it has gone with its host, remove {_marker(path)}"
    return stop
