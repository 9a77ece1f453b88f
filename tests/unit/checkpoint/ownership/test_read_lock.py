"""A checkpoint that is open, and one that is on its way out."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.ownership import read_lock as reading
from elastic_ckpt.checkpoint.ownership.read_lock import ReadLock, removing
from elastic_ckpt.checkpoint.verify import MANIFEST_NAME
from elastic_ckpt.errors import CheckpointRejected
from tests.checkpoints import make_checkpoint, open_job, read_locked_elsewhere


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(open_job(tmp_path / "job"))


def test_many_may_read_and_the_last_one_lets_it_go(checkpoint: Path) -> None:
    first, second = ReadLock(checkpoint), ReadLock(checkpoint)
    first.release()
    with removing(checkpoint) as why:
        assert why == "it is open"
    second.release()
    second.release()
    with removing(checkpoint) as why:
        assert why == ""


def test_a_reader_waits_for_a_removal_that_fails(checkpoint: Path) -> None:
    """The checkpoint is still there, and whole: it must not be taken for a bad one."""
    entered, leave = threading.Event(), threading.Event()

    def remove_and_fail() -> None:
        with removing(checkpoint):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=remove_and_fail)
    thread.start()
    entered.wait(30)
    timer = threading.Timer(0.1, leave.set)
    timer.start()
    lock = ReadLock(checkpoint)
    with removing(checkpoint) as why:
        assert why == "it is open"
    lock.release()
    thread.join(30)
    timer.join(30)
    assert leave.is_set() and not thread.is_alive()


def test_reader_gets_an_error_for_an_endless_removal(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_PATIENCE_SECONDS", 0.0)
    before = set(os.listdir("/proc/self/fd"))
    with removing(checkpoint), pytest.raises(CheckpointRejected, match="is being removed"):
        ReadLock(checkpoint)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_reader_does_not_wait_for_what_has_gone(checkpoint: Path) -> None:
    """It was renamed away under the lock; nothing will bring it back."""
    entered, leave = threading.Event(), threading.Event()

    def remove() -> None:
        with removing(checkpoint):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=remove)
    thread.start()
    entered.wait(30)
    checkpoint.rename(checkpoint.with_name("gone"))
    with pytest.raises(CheckpointRejected, match="is being removed"):
        ReadLock(checkpoint)
    leave.set()
    thread.join(30)


@pytest.mark.parametrize("again", [False, True], ids=["gone", "another in its place"])
def test_a_checkpoint_that_goes_between_the_open_and_the_lock_is_gone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    flock = fcntl.flock

    def rename_first(fd: int, kind: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        moved = checkpoint.rename(checkpoint.with_name("moved"))
        if again:
            shutil.copytree(moved, checkpoint)
        flock(fd, kind)

    monkeypatch.setattr(fcntl, "flock", rename_first)
    with pytest.raises(CheckpointRejected, match="is being removed"):
        ReadLock(checkpoint)


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_one_can_read_and_nothing_is_removed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def missing(fd: int, kind: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", missing)
    ReadLock(checkpoint).release()
    with removing(checkpoint) as why:
        assert "may be open" in why


def test_another_error_of_the_disk_is_no_rejection(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int, kind: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        ReadLock(checkpoint)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), removing(checkpoint):
        pass
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_manifest_that_is_a_link_or_a_fifo_is_not_followed(checkpoint: Path) -> None:
    manifest = checkpoint / MANIFEST_NAME
    manifest.rename(checkpoint / "real")
    manifest.symlink_to("real")
    with pytest.raises(OSError):
        ReadLock(checkpoint)
    manifest.unlink()
    with pytest.raises(CheckpointRejected):
        ReadLock(checkpoint)


def test_killed_reader_does_not_block(checkpoint: Path) -> None:
    with read_locked_elsewhere(checkpoint) as reader:
        with removing(checkpoint) as why:
            assert why == "it is open"
        reader.kill()
        reader.wait()
        with removing(checkpoint) as why:
            assert why == ""


def test_a_released_lock_is_not_kept_by_a_child_that_was_forked_meanwhile(
    checkpoint: Path,
) -> None:
    """A DataLoader's worker lives long after the load."""
    lock = ReadLock(checkpoint)
    reading_end, writing_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing_end)
        os.read(reading_end, 1)
        os._exit(0)
    try:
        lock.release()
        with removing(checkpoint) as why:
            assert why == ""
    finally:
        os.close(writing_end)
        os.close(reading_end)
        os.waitpid(pid, 0)
