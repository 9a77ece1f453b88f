"""Who may write: one supervisor per node, one run per job.

The run number decides (``fence.py``); the lock is a first check that is fast and names the holder.
The kernel holds it (filelock, on flock), so that a killed owner never blocks another run. Where
the file system knows no locks, filelock's marker file stands in; it names host, pid and start, and
a marker whose owner is provably gone is taken over. Who holds a lock, for people, stands in a file
beside it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import filelock
import msgspec

from elastic_ckpt.checkpoint.cleanup import take_over
from elastic_ckpt.checkpoint.ownership.fence import (
    Ownership,
    RunOwner,
    new_record,
    newest_number,
    read_beat,
    read_run,
)
from elastic_ckpt.checkpoint.ownership.read_lock import NO_LOCKS
from elastic_ckpt.errors import DirectoryUnusable, LockHeld, StopAborted
from elastic_ckpt.jobdir.node_record import ProcessIdentity
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.lease import LEASE_SECONDS, NODE_LEASE_SECONDS, LeaseWatch, Verdict
from elastic_ckpt.util.files import read_bounded, write_atomic
from elastic_ckpt.util.text import printable

_TAKE_OVER_SECONDS: Final = 0.5
"""Time to find that a marker's owner has died, and to take its place."""

_POLL_SECONDS: Final = 0.5


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
    """What one supervisor holds: its node's lock, and on the node that leads the job. Other nodes
    of the run are admitted by their own locks."""

    def __init__(
        self,
        job: JobDirectory,
        node: str,
        run_id: str,
        *,
        leads: bool = True,
        endpoint: str = "",
        patience: Patience | None = None,
        after: int = 0,
    ) -> None:
        """Take them; raises as :class:`HeldLock` and :class:`OwnedJob`.

        Args:
            after: number of the run whose lease this node has waited out already; 0 for none.
        """
        patience = patience or Patience()
        # None if a host that is gone still holds it.
        self._node: HeldLock | None = _take_node(job, node, run_id, patience)
        self._job: OwnedJob | None = None
        try:
            if leads:
                self._job = OwnedJob(job, node, run_id, endpoint, patience, after)
        except BaseException:
            self._let_go()
            raise

    @property
    def ownership(self) -> Ownership | None:
        """The run number; None on a node that follows."""
        return self._job.ownership if self._job else None

    def record(self, incarnation: int) -> None:
        """Write, for people, which incarnation may seal; a full disk must not end the run."""
        with contextlib.suppress(OSError):
            if self._job is not None and self._job.lock is not None:
                self._job.lock.record(incarnation)

    def release(self, *, passed_on: bool = False) -> None:
        """Release them."""
        if self._job is not None:
            self._job.release(passed_on=passed_on)
        self._let_go()

    def _let_go(self) -> None:
        if self._node is not None:
            self._node.release()


def _take_node(job: JobDirectory, node: str, run_id: str, patience: Patience) -> HeldLock | None:
    """Take a node's lock; if another host holds it, wait until that has surely gone."""
    path = job.node_lock(node)
    with contextlib.suppress(LockHeld):
        return HeldLock(path, run_id)
    holder = read_owner(path)
    if holder is None or holder.owner.is_alive() is not None:
        return HeldLock(path, run_id)  # which says who holds it

    def beat() -> bytes:
        with contextlib.suppress(OSError):
            return read_bounded(job.heartbeat(node), 4096)
        return b""

    watch = LeaseWatch(beat(), time.monotonic(), gone=False, lease=NODE_LEASE_SECONDS)
    who = f"pid {holder.owner.pid} on {holder.owner.host} (run {holder.run_id})"
    patience.say(
        f"{who} still holds the name of node {node}: waiting up to {NODE_LEASE_SECONDS:.0f} s to "
        "be sure that it is gone"
    )
    while (verdict := watch.judge(beat(), time.monotonic())) is Verdict.WAIT:
        patience.check(who)
        with contextlib.suppress(LockHeld):
            return HeldLock(path, run_id)
        time.sleep(_POLL_SECONDS)
    if verdict is Verdict.REFUSE:
        raise LockHeld(
            f"node {node} is in use by {who}, which is alive: stop that one first, or choose "
            "another --node-name"
        )
    return None


@dataclass(frozen=True)
class Patience:
    """How a run waits for a lease.

    Attributes:
        say: shows one line to the user.
        leaves: whether this process was told to end.
    """

    say: Callable[[str], None] = lambda line: None
    leaves: Callable[[], bool] = lambda: False

    def check(self, who: str) -> None:
        """Raise StopAborted if this process was told to end while it waits for an owner."""
        if self.leaves():
            raise StopAborted(
                f"a signal came during the wait for {who}, nothing was started: rerun the same "
                "command"
            )


class OwnedJob:
    """A job that this process owns: by its run number, and if it got it by the lock as well.

    Attributes:
        lock: None if a host that is gone still holds it.
    """

    def __init__(
        self,
        job: JobDirectory,
        node: str,
        run_id: str,
        endpoint: str,
        patience: Patience,
        after: int = 0,
    ) -> None:
        """Take the job over, at once if the previous owner is surely gone, else after its lease;
        ``after`` as in :class:`RunLocks`.

        Raises:
            LockHeld: the previous owner is alive, or another run was faster.
            StopAborted: a signal came during the wait.
            DirectoryUnusable: the file system refuses.
        """
        self._job = job
        self.lock: HeldLock | None = None
        number = after or newest_number(job)
        previous = read_run(job, number) if number else None
        try:
            if after:
                with contextlib.suppress(LockHeld):  # the number alone counts
                    self.lock = HeldLock(job.lock, run_id)
            else:
                self._acquire(run_id, previous)
                self._wait_for_lease(number, previous, run_id, patience)
            record = new_record(job, node, run_id, endpoint, previous)
            self.ownership = Ownership.claim(job, number + 1, record)
            take_over(job.session(""), self.ownership)
        except FileExistsError:
            self._let_go()
            raise LockHeld(f"another run has just taken over {job.root}: rerun to see it") from None
        except OSError as error:
            self._let_go()
            raise DirectoryUnusable(
                f"cannot write {job.runs}: {error.strerror or error}; choose another directory"
            ) from None
        except BaseException:
            self._let_go()
            raise

    def release(self, *, passed_on: bool = False) -> None:
        """End the run, and release the lock."""
        self.ownership.end(passed_on=passed_on)
        self._let_go()

    def _acquire(self, run_id: str, previous: RunOwner | None) -> None:
        try:
            self.lock = HeldLock(self._job.lock, run_id)
        except LockHeld:
            holder = read_owner(self._job.lock)
            # Where locks are leases of a file server, a host that is gone may hold it for minutes.
            is_here = holder is None or holder.owner.is_alive() is not None
            if previous is None or is_here:
                raise

    def _wait_for_lease(
        self, number: int, previous: RunOwner | None, run_id: str, patience: Patience
    ) -> None:
        job = self._job
        # A record that is torn may be of a run that is just starting.
        gone = number == 0 or (previous is not None and (previous.ended or self._is_gone(previous)))
        watch = LeaseWatch(read_beat(job, number), time.monotonic(), gone=gone)
        who = previous.shown if previous else f"run number {number}"
        if not gone:
            patience.say(
                f"{who} did not end this job properly: waiting up to {LEASE_SECONDS:.0f} s to be "
                "sure that it is gone"
            )
        while (verdict := watch.judge(read_beat(job, number), time.monotonic())) is Verdict.WAIT:
            patience.check(who)
            if newest_number(job) != number:
                raise LockHeld(f"another run has just taken over {job.root}: rerun to see it")
            time.sleep(_POLL_SECONDS)
        if verdict is Verdict.REFUSE:
            raise LockHeld(
                f"{job.root} is owned by {who}, which is alive: stop that one first, or choose "
                "another --dir"
            )
        if self.lock is None:
            with contextlib.suppress(LockHeld):  # the number alone counts
                self.lock = HeldLock(job.lock, run_id)

    def _is_gone(self, previous: RunOwner) -> bool:
        """Return whether this host's kernel proves that a previous owner is gone."""
        if not previous.owner.is_local:
            return False
        with contextlib.suppress(OSError):
            found = os.stat(self._job.lock)
            # It held the very lock that this process holds now.
            if self.lock is not None and previous.lock == (found.st_dev, found.st_ino):
                return True
        # Another host name is another container: its processes are not visible here.
        is_visible = previous.owner.host == ProcessIdentity.current().host
        return is_visible and previous.owner.is_alive() is False

    def _let_go(self) -> None:
        if self.lock is not None:
            self.lock.release()


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
