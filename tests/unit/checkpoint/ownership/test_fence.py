"""Run numbers: one owner at a time, and no seal by a run that another one has gone past."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from elastic_ckpt.checkpoint.cleanup import recover
from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.ownership import fence as fences
from elastic_ckpt.checkpoint.ownership import job_lock
from elastic_ckpt.checkpoint.ownership.fence import Ownership, newest_number, read_run
from elastic_ckpt.checkpoint.ownership.job_lock import HeldLock, OwnedJob, Patience, RunLocks
from elastic_ckpt.checkpoint.ownership.mount import mount_of
from elastic_ckpt.errors import (
    DirectoryUnusable,
    ExitCode,
    LockHeld,
    RunSuperseded,
    StopAborted,
)
from elastic_ckpt.jobdir.heartbeat import Heartbeat, write_heartbeat
from elastic_ckpt.jobdir.node_record import ProcessIdentity
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.lease import LEASE_SECONDS, NODE_LEASE_SECONDS
from tests.checkpoints import fill, held_elsewhere, make_header

ELSEWHERE = ProcessIdentity("another-host", "another-boot", 7, 1.0)


def own(job: JobDirectory, patience: Patience | None = None) -> OwnedJob:
    return OwnedJob(job, "here", "mine", "", patience or Patience())


def leave(job: JobDirectory, owner: ProcessIdentity = ELSEWHERE, **changes: object) -> Ownership:
    """Leave a run of another process, which has not ended."""
    record = fences.new_record(job, "there", "theirs", "", None)
    record = msgspec.structs.replace(record, owner=owner, lock=(0, 0), **changes)
    return Ownership.claim(job, newest_number(job) + 1, record)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """A clock that moves by each wait alone."""
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(job_lock.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(job_lock.time, "sleep", sleep)
    return lambda: now[0]


def test_each_run_has_the_next_number_and_ends_it(job: JobDirectory) -> None:
    for number in (1, 2, 3):
        owned = own(job)
        assert owned.ownership.number == newest_number(job) == number
        owned.ownership.check()
        owned.release()
        found = read_run(job, number)
        assert found is not None and found.ended


def test_killed_run_of_this_host_is_taken_over_at_once(
    job: JobDirectory, clock: Callable[[], float]
) -> None:
    """It held the lock that this process now holds, so the kernel says that it is gone."""
    killed = own(job)
    assert killed.lock is not None
    killed.lock.release()  # as the kernel does it; the record is not ended
    began = clock()
    assert own(job).ownership.number == 2
    assert clock() == began


def test_run_of_another_host_is_waited_out(job: JobDirectory, clock: Callable[[], float]) -> None:
    leave(job)
    said: list[str] = []
    began = clock()
    assert own(job, Patience(said.append)).ownership.number == 2
    assert LEASE_SECONDS <= clock() - began < LEASE_SECONDS + 2
    [line] = said
    assert "pid 7 on another-host (run theirs)" in line and "20 s" in line


def test_run_of_another_host_that_beats_is_refused(
    job: JobDirectory, clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No clocks are compared: only the change of its beat counts."""
    alive = leave(job)
    plain = job_lock.time.sleep

    def beat_meanwhile(seconds: float) -> None:
        plain(seconds)
        if clock() > 105.0:
            alive.beat()

    monkeypatch.setattr(job_lock.time, "sleep", beat_meanwhile)
    with pytest.raises(LockHeld, match=r"another-host.* is alive") as refusal:
        own(job)
    assert refusal.value.exit_code is ExitCode.UNAVAILABLE
    assert newest_number(job) == 1
    HeldLock(job.lock, "the lock is free again").release()


def test_run_that_has_ended_elsewhere_is_not_waited_for(
    job: JobDirectory, clock: Callable[[], float]
) -> None:
    leave(job, ended=True)
    began = clock()
    own(job).release()
    assert clock() == began


def test_living_run_of_this_host_whose_lock_was_removed_is_refused(
    job: JobDirectory, clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cleaner removed the lock file; the beat still shows that the run lives."""
    first = own(job)
    job.lock.unlink()
    plain = job_lock.time.sleep
    monkeypatch.setattr(
        job_lock.time, "sleep", lambda seconds: (plain(seconds), first.ownership.beat())
    )
    with pytest.raises(LockHeld, match=f"pid {os.getpid()} on {socket.gethostname()}"):
        own(job)


def test_lock_that_a_host_that_is_gone_still_holds_does_not_block(
    job: JobDirectory, clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server keeps locks for minutes after their host has gone."""
    leave(job)
    with held_elsewhere(job.lock):
        holder = job_lock.LockOwner("theirs", 0, ELSEWHERE)
        monkeypatch.setattr(job_lock, "read_owner", lambda path: holder)
        owned = own(job)
        assert owned.lock is None and owned.ownership.number == 2
        owned.release()


def test_signal_ends_the_wait(job: JobDirectory, clock: Callable[[], float]) -> None:
    leave(job)
    with pytest.raises(StopAborted, match="rerun the same command") as aborted:
        own(job, Patience(leaves=lambda: clock() > 103.0))
    assert aborted.value.exit_code is ExitCode.PREEMPTED_UNSAVED
    assert newest_number(job) == 1


def test_of_two_that_wait_one_is_refused(
    job: JobDirectory, clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(job)
    plain = job_lock.time.sleep

    def other_is_faster(seconds: float) -> None:
        plain(seconds)
        if newest_number(job) == 1 and clock() > 110.0:
            leave(job)

    monkeypatch.setattr(job_lock.time, "sleep", other_is_faster)
    with pytest.raises(LockHeld, match="another run has just taken over"):
        own(job)


def test_a_full_disk_is_an_unusable_directory(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plain = os.fsync
    monkeypatch.setattr(fences.os, "fsync", full)
    monkeypatch.setattr(job_lock, "write_atomic", lambda path, data: None)
    with pytest.raises(DirectoryUnusable, match=os.strerror(errno.ENOSPC)):
        own(job)
    monkeypatch.setattr(fences.os, "fsync", plain)
    assert newest_number(job) == 0
    own(job).release()


# -- the fence ----------------------------------------------------------------------------------


def attempt_of(owned: OwnedJob, step: int = 10) -> tuple[DiskAttempt, Callable[[], Path]]:
    job, fence = owned.ownership.job, owned.ownership
    attempt = DiskAttempt.begin(job, step, fence=fence)
    header = make_header(attempt, run=fence.number)
    files = fill(attempt, header)
    return attempt, lambda: attempt.publish(header, files)


def test_run_that_was_taken_over_seals_nothing(job: JobDirectory) -> None:
    owned = own(job)
    _, publish = attempt_of(owned)
    leave(job)
    with pytest.raises(RunSuperseded, match=r"another-host.*seals nothing") as refusal:
        publish()
    assert refusal.value.exit_code is ExitCode.UNAVAILABLE
    assert not job.checkpoint(0, 10).exists()
    with pytest.raises(RunSuperseded):
        DiskAttempt.begin(job, 20, fence=owned.ownership)
    with pytest.raises(RunSuperseded):
        recover(job, fence=owned.ownership)


def test_late_writer_that_had_passed_the_check_cannot_rename_after_the_take_over(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attempt was moved before the new run loads: it is sealed by then, or never by it."""
    first = own(job)
    _, publish = attempt_of(first)
    rename = os.rename

    def take_over_first(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        second = leave(job)
        assert [what for _, what in recover(job, fence=second)] == ["sealed"]
        rename(source, target)

    monkeypatch.setattr(os, "rename", take_over_first)
    sealed = publish()  # by the new run, from what this one had written in full
    assert sealed == job.checkpoint(0, 10)
    assert list(job.attempts.iterdir()) == []


def test_incomplete_attempt_of_a_late_writer_is_gone(job: JobDirectory) -> None:
    first = own(job)
    attempt = DiskAttempt.begin(job, 10, fence=first.ownership)
    second = leave(job)
    recover(job, fence=second)
    assert not attempt.path.exists() and list(job.attempts.iterdir()) == []


def test_restarted_run_leaves_the_attempts_of_a_later_one_alone(job: JobDirectory) -> None:
    first = own(job)
    second = leave(job)
    attempt = DiskAttempt.begin(job, 10, fence=second)
    with pytest.raises(RunSuperseded):
        recover(job, fence=first.ownership)
    assert attempt.path.is_dir()


def test_run_whose_number_another_directory_has_is_not_the_owner(job: JobDirectory) -> None:
    """The records were removed, and another run began anew with the same number."""
    first = own(job)
    for path in list(job.runs.iterdir()):
        path.unlink()
    leave(job)
    with pytest.raises(RunSuperseded):
        first.ownership.check()


def test_record_that_was_removed_is_written_again(job: JobDirectory) -> None:
    owned = own(job)
    for path in list(job.runs.iterdir()):
        path.unlink()
    owned.ownership.beat_and_check()
    assert newest_number(job) == 1


def test_each_beat_differs_from_those_before(job: JobDirectory) -> None:
    owned = own(job)
    beats = [fences.read_beat(job, 1)]
    for _ in range(20):  # longer than any lease
        owned.ownership.beat()
        beats.append(fences.read_beat(job, 1))
    assert len(set(beats)) == len(beats) and all(beats)


def test_beat_that_was_removed_is_written_again(job: JobDirectory) -> None:
    owned = own(job)
    (job.runs / "000001.beat").unlink()
    owned.ownership.beat()
    assert fences.read_beat(job, 1)


def test_beat_where_files_cannot_change_their_length_is_written(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    owned = own(job)
    monkeypatch.setattr(os, "truncate", refuse)
    before = fences.read_beat(job, 1)
    owned.ownership.beat()
    assert fences.read_beat(job, 1) != before


def test_run_knows_whether_its_directory_shows_changes(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = own(job)
    assert first.ownership.shows_changes
    first.release()
    monkeypatch.setattr(fences, "stamp_of", lambda directory: (1,))
    assert not own(job).ownership.shows_changes


def test_only_the_newest_records_are_kept(job: JobDirectory) -> None:
    for _ in range(fences.KEPT_RECORDS + 5):
        own(job).release()
    numbers = sorted(int(path.name.split(".")[0]) for path in job.runs.glob("*.json"))
    assert numbers == list(range(6, fences.KEPT_RECORDS + 6))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff" * 100, b"x" * 100_000])
def test_torn_record_still_counts_as_a_run(
    job: JobDirectory, data: bytes, clock: Callable[[], float]
) -> None:
    """A kill between its creation and its contents; it is waited for, and then taken over."""
    own(job).release()
    (job.runs / "000002.json").write_bytes(data)
    began = clock()
    assert own(job).ownership.number == 3
    assert clock() - began >= LEASE_SECONDS


class Mounts:
    """Stands in for the mounts of this host: the job's directory is on mount 1, then on others."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1
        patch.setattr(fences, "mount_of", lambda directory: self.now)


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> Mounts:
    return Mounts(monkeypatch)


def test_nothing_is_written_where_the_disk_was_unmounted(
    job: JobDirectory, mounts: Mounts, tmp_path: Path
) -> None:
    """Else a checkpoint is hidden once it is mounted again, and the next run does not find it."""
    owned = own(job)
    disk = job.root.rename(tmp_path / "disk")
    job.root.mkdir()
    mounts.now = 2  # of the directory below the mount point
    for act in (
        owned.ownership.check,
        owned.ownership.beat_and_check,
        lambda: DiskAttempt.begin(job, 8, fence=owned.ownership),
        lambda: recover(job, fence=owned.ownership),
    ):
        with pytest.raises(OSError, match="its disk is not mounted") as raised:
            act()
        assert raised.value.errno == errno.ESTALE
    assert not list(job.root.iterdir())
    job.root.rmdir()
    disk.rename(job.root)
    mounts.now = 3
    shutil.rmtree(job.runs)  # by a cleaner
    owned.ownership.beat_and_check()
    DiskAttempt.begin(job, 8, fence=owned.ownership).drop()


def test_deleted_directory_on_the_same_mount_is_made_again(
    job: JobDirectory, mounts: Mounts
) -> None:
    owned = own(job)
    shutil.rmtree(job.root)
    owned.ownership.beat_and_check()
    assert newest_number(job) == 1
    owned.ownership.check()


def test_another_job_on_the_mount_is_not_taken_for_a_newer_run(
    job: JobDirectory, mounts: Mounts
) -> None:
    owned = own(job)
    shutil.rmtree(job.root)
    job.prepare()
    mounts.now = 2
    leave(job)
    leave(job)
    with pytest.raises(OSError, match="its disk is not mounted"):
        owned.ownership.check()


def test_mount_of_a_missing_directory_is_its_ancestors(tmp_path: Path) -> None:
    assert mount_of(tmp_path / "a" / "b") == mount_of(tmp_path) != mount_of(Path("/proc"))


# -- the name of a node -----------------------------------------------------------------------


@pytest.fixture
def held_node(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file server still keeps the lock that another host took as node ``here``."""
    read = job_lock.read_owner
    holder = job_lock.LockOwner("theirs", 0, ELSEWHERE)
    path = job.node_lock("here")
    monkeypatch.setattr(job_lock, "read_owner", lambda it: holder if it == path else read(it))
    with held_elsewhere(path):
        yield


@pytest.mark.usefixtures("held_node")
def test_node_lock_of_a_host_that_is_gone_is_waited_out(
    job: JobDirectory, clock: Callable[[], float]
) -> None:
    said: list[str] = []
    began = clock()
    locks = RunLocks(job, "here", "mine", patience=Patience(said.append))
    assert NODE_LEASE_SECONDS <= clock() - began < NODE_LEASE_SECONDS + 2
    assert "pid 7 on another-host (run theirs)" in said[0] and "node here" in said[0]
    assert locks.ownership is not None
    locks.release()


@pytest.mark.usefixtures("held_node")
def test_node_that_beats_elsewhere_is_refused(
    job: JobDirectory, clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = job_lock.time.sleep

    def beat_meanwhile(seconds: float) -> None:
        plain(seconds)
        if clock() > 108.0:
            write_heartbeat(job, "here", Heartbeat(wall=clock()))

    monkeypatch.setattr(job_lock.time, "sleep", beat_meanwhile)
    with pytest.raises(LockHeld, match=r"node here is in use by .*another-host.*--node-name"):
        RunLocks(job, "here", "mine")
    assert newest_number(job) == 0


@pytest.mark.usefixtures("held_node")
def test_signal_ends_the_wait_for_a_node(job: JobDirectory, clock: Callable[[], float]) -> None:
    with pytest.raises(StopAborted):
        RunLocks(job, "here", "mine", patience=Patience(leaves=lambda: clock() > 103.0))
