"""Who may write: one supervisor per node, one run per job.

The kernel holds the lock (filelock, on flock), so that a killed owner never blocks anybody. Who
holds it stands in a file beside it: opening a lock file truncates it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import filelock
import msgspec

from elastic_ckpt.errors import DirectoryUnusable, LockHeld
from elastic_ckpt.store.files import write_atomic
from elastic_ckpt.store.layout import JobDirectory
from elastic_ckpt.store.records import ProcessIdentity


class LockOwner(msgspec.Struct, frozen=True):
    """What the holder of a lock says of itself."""

    run_id: str
    incarnation: int
    owner: ProcessIdentity


class HeldLock:
    """A lock that this process holds until it ends or calls :meth:`release`."""

    def __init__(self, path: Path, run_id: str) -> None:
        """Take the lock, without waiting.

        Raises:
            LockHeld: somebody else has it; the message names pid and host.
            DirectoryUnusable: the file system refuses.
        """
        self._path = path
        self._run_id = run_id
        self._lock = filelock.FileLock(path, timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise LockHeld(f"{path} is held by {_describe(path)}") from None
        except (OSError, NotImplementedError) as error:  # older filelock: no flock here
            why = getattr(error, "strerror", None) or error
            raise DirectoryUnusable(f"cannot lock {path}: {why}") from None
        try:
            self.record(0)
        except OSError as error:
            self._lock.release()
            raise DirectoryUnusable(
                f"cannot write {_owner_file(path)}: {error.strerror or error}"
            ) from None

    def record(self, incarnation: int) -> None:
        """Say who holds the lock, and for which incarnation."""
        owner = LockOwner(self._run_id, incarnation, ProcessIdentity.current())
        write_atomic(_owner_file(self._path), msgspec.json.encode(owner))

    def release(self) -> None:
        """Let the next one in. The lock file stays: removing it would admit two."""
        with contextlib.suppress(OSError):
            _owner_file(self._path).unlink(missing_ok=True)
        self._lock.release()


class RunLocks:
    """The locks of one supervisor: its node's, and the job's.

    A supervisor of the same run on another node is admitted beside us by its own node lock; the
    node of group rank 0 alone holds the job's.
    """

    def __init__(self, job: JobDirectory, node: str, run_id: str) -> None:
        """Take both; raises as :class:`HeldLock`."""
        self._node = HeldLock(job.node_lock(node), run_id)
        try:
            self._job = HeldLock(job.lock, run_id)
        except BaseException:
            self._node.release()
            raise

    def record(self, incarnation: int) -> None:
        """Say which incarnation may seal; for people, so a full disk must not end the run."""
        with contextlib.suppress(OSError):
            self._job.record(incarnation)

    def release(self) -> None:
        """Release both."""
        self._job.release()
        self._node.release()


def read_owner(path: Path) -> LockOwner | None:
    """Who holds, or last held, a lock."""
    try:
        return msgspec.json.decode(_owner_file(path).read_bytes(), type=LockOwner)
    except (OSError, msgspec.MsgspecError):
        return None


def _owner_file(path: Path) -> Path:
    return path.with_name(path.name + ".owner")


def _describe(path: Path) -> str:
    found = read_owner(path)
    if found is None:
        return "another process"
    return (
        f"pid {found.owner.pid} on {found.owner.host} (run {found.run_id}): "
        "stop that one first, or choose another --dir"
    )
