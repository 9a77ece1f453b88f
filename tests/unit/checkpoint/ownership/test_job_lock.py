"""One supervisor per node, one run per job, and no lock that outlives its holder."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.ownership import job_lock as locks
from elastic_ckpt.checkpoint.ownership.job_lock import HeldLock, RunLocks, read_owner
from elastic_ckpt.errors import DirectoryUnusable, ExitCode, LockHeld
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import held_elsewhere, open_job


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


def test_second_holder_sees_who_holds_the_lock(job: JobDirectory) -> None:
    """The message names pid, host and run, and what to do; the exit code is 73."""
    with held_elsewhere(job.lock) as holder:
        with pytest.raises(LockHeld) as refusal:
            HeldLock(job.lock, "mine")
        message = str(refusal.value)
        assert f"pid {holder.pid} on {socket.gethostname()} (run other-run)" in message
        assert "stop that one first" in message
        assert refusal.value.exit_code is ExitCode.UNAVAILABLE
        owner = read_owner(job.lock)
        assert owner is not None and owner.owner.pid == holder.pid


def test_a_refused_holder_does_not_touch_the_owners_record(job: JobDirectory) -> None:
    """To try is not to overwrite who holds it."""
    with held_elsewhere(job.lock):
        before = read_owner(job.lock)
        for _ in range(2):
            with pytest.raises(LockHeld):
                HeldLock(job.lock, "mine")
        assert read_owner(job.lock) == before


def test_killed_holder_does_not_block(job: JobDirectory) -> None:
    """The kernel lets go of the lock; the record that is left behind counts for nothing."""
    with held_elsewhere(job.lock) as holder:
        holder.kill()
        holder.wait()
        stale = read_owner(job.lock)
        assert stale is not None and stale.owner.pid == holder.pid
        lock = HeldLock(job.lock, "mine")
    owner = read_owner(job.lock)
    assert owner is not None and (owner.owner.pid, owner.run_id) == (os.getpid(), "mine")
    lock.release()


def test_a_released_lock_can_be_taken_and_leaves_its_file(job: JobDirectory) -> None:
    """The lock file must stay: removing it would admit two."""
    HeldLock(job.lock, "first").release()
    assert job.lock.exists()
    assert read_owner(job.lock) is None
    HeldLock(job.lock, "second").release()


def test_the_record_holds_the_incarnation(job: JobDirectory) -> None:
    """Whoever looks sees which launch may seal."""
    both = RunLocks(job, "here", "mine")
    both.record(7)
    owner = read_owner(job.lock)
    assert owner is not None and (owner.run_id, owner.incarnation) == ("mine", 7)
    both.release()
    assert read_owner(job.lock) is None and read_owner(job.node_lock("here")) is None


def test_the_node_lock_is_released_when_the_job_is_taken(job: JobDirectory) -> None:
    """A run that is refused leaves the node to the next one."""
    with held_elsewhere(job.lock):
        with pytest.raises(LockHeld) as refusal:
            RunLocks(job, "here", "mine")
        # The error is still held, and with it all that its traceback keeps from being collected.
        assert str(job.lock) in str(refusal.value)
        assert read_owner(job.node_lock("here")) is None
        HeldLock(job.node_lock("here"), "mine").release()
    RunLocks(job, "here", "mine").release()


def test_taken_node_is_refused_before_the_job_lock(job: JobDirectory) -> None:
    """The job's lock stays free."""
    with held_elsewhere(job.node_lock("here")):
        with pytest.raises(LockHeld, match="here"):
            RunLocks(job, "here", "mine")
        HeldLock(job.lock, "mine").release()


def test_a_lock_that_cannot_be_opened_is_an_unusable_directory(job: JobDirectory) -> None:
    """No traceback for a place that is not a file."""
    job.lock.mkdir()
    with pytest.raises(DirectoryUnusable, match="cannot lock"):
        HeldLock(job.lock, "mine")


def test_a_full_disk_is_an_unusable_directory_and_leaves_no_lock(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is released if its owner cannot be recorded."""

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(locks, "write_atomic", full)
    with pytest.raises(DirectoryUnusable, match=os.strerror(errno.ENOSPC)) as refusal:
        HeldLock(job.lock, "mine")
    monkeypatch.undo()
    # The error is still held, and with it all that its traceback keeps from being collected.
    assert refusal.value.exit_code is ExitCode.UNAVAILABLE
    HeldLock(job.lock, "next").release()
