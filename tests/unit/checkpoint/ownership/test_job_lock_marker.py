"""Where the file system knows no locks: a marker, which names its owner, stands in."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from elastic_ckpt.checkpoint.ownership import job_lock as locks
from elastic_ckpt.checkpoint.ownership.job_lock import HeldLock, LockOwner, read_owner
from elastic_ckpt.errors import ExitCode, LockHeld
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import held_elsewhere, open_job

WITHOUT_FLOCK = """
import errno, fcntl, os, sys
from pathlib import Path

def missing(fd, kind):
    raise OSError(int(sys.argv[2]), os.strerror(int(sys.argv[2])))

fcntl.flock = missing
from elastic_ckpt.checkpoint.ownership.job_lock import HeldLock

lock = HeldLock(Path(sys.argv[1]), "other-run")
print("held", flush=True)
sys.stdin.read()
os._exit(0)
"""

LEAVES_A_CHILD = """
import os, signal, subprocess, sys
from pathlib import Path
from elastic_ckpt.checkpoint.ownership.job_lock import HeldLock

lock = HeldLock(Path(sys.argv[1]), "other-run")
[fd] = [int(fd) for fd in os.listdir("/proc/self/fd")
        if os.path.realpath(f"/proc/self/fd/{fd}") == sys.argv[1]]
child = subprocess.Popen(["sleep", "60"], pass_fds=[fd])
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def without_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The error with which the file system refuses every lock."""

    def missing(fd: int, kind: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", missing)
    return int(request.param)


@pytest.fixture
def holder(job: JobDirectory, without_flock: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the job's lock by a marker."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_FLOCK, str(job.lock), str(without_flock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def marker(job: JobDirectory) -> Path:
    """The file that names the owner: process, host, start."""
    found = [
        path for path in job.control.glob("lock*")
        if path.is_file() and re.match(rb"\d+\n", path.read_bytes())
    ]  # fmt: skip
    assert len(found) == 1, found
    return found[0]


def change_marker(job: JobDirectory, line: int, value: str) -> None:
    path = marker(job)
    lines = path.read_text().splitlines()
    lines[line] = value
    path.write_text("\n".join(lines) + "\n")


def test_a_live_holder_is_respected_and_named(
    job: JobDirectory, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_TAKE_OVER_SECONDS", 0.05)
    for _ in range(2):
        with pytest.raises(LockHeld) as refusal:
            HeldLock(job.lock, "mine")
    assert f"pid {holder.pid} on {socket.gethostname()}" in str(refusal.value)
    assert refusal.value.exit_code is ExitCode.UNAVAILABLE


def test_a_dead_holder_is_followed(job: JobDirectory, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    lock = HeldLock(job.lock, "mine")
    owner = read_owner(job.lock)
    assert owner is not None and owner.owner.pid == os.getpid()
    lock.release()


def test_reused_pid_holds_nothing(job: JobDirectory, holder: subprocess.Popen[str]) -> None:
    """The process with that number lives, but began at another time."""
    token = int(marker(job).read_text().splitlines()[2])
    change_marker(job, 2, str(token - 1))
    HeldLock(job.lock, "mine").release()


def test_holder_on_another_host_is_respected_with_advice(
    job: JobDirectory, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pid means nothing here, and whether it lives cannot be known."""
    monkeypatch.setattr(locks, "_TAKE_OVER_SECONDS", 0.05)
    holder.kill()
    holder.wait()
    change_marker(job, 1, "another-host")
    owner = read_owner(job.lock)
    assert owner is not None
    elsewhere = msgspec.structs.replace(owner.owner, host="another-host", boot_id="another boot")
    job.lock.with_name("lock.owner").write_bytes(
        msgspec.json.encode(LockOwner("other-run", 3, elsewhere))
    )
    with pytest.raises(LockHeld) as refusal:
        HeldLock(job.lock, "mine")
    message = str(refusal.value)
    assert f"pid {owner.owner.pid} on another-host (run other-run)" in message
    assert str(marker(job)) in message and "remove" in message


def test_a_released_marker_leaves_nothing_that_blocks(
    job: JobDirectory, without_flock: int
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a run's output begins with no warning of a library's
        for _ in range(3):
            HeldLock(job.lock, "mine").release()
    assert read_owner(job.lock) is None
    assert set(os.listdir("/proc/self/fd")) == before


def test_old_lock_file_does_not_block(job: JobDirectory, without_flock: int) -> None:
    """The directory was moved to another file system."""
    job.lock.write_bytes(b"")
    held = HeldLock(job.lock, "mine")
    assert read_owner(job.lock).run_id == "mine"
    held.release()
    assert read_owner(job.lock) is None


def test_two_jobs_beside_each_other_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Each directory has a lock of its own, also where one job lies in the other's."""
    one, two = open_job(tmp_path / "one"), open_job(tmp_path / "two")
    inner = open_job(tmp_path / "one" / "inner")
    with held_elsewhere(one.lock):
        for job in (two, inner):
            held = HeldLock(job.lock, "mine")
            assert read_owner(job.lock).run_id == "mine"
            held.release()
        assert read_owner(one.lock).run_id == "other-run"


def test_lock_kept_by_a_child_differs_from_a_live_owner(
    job: JobDirectory,
) -> None:
    """The owner was killed; a process that it had started kept the descriptor."""
    owner = subprocess.Popen(
        [sys.executable, "-c", LEAVES_A_CHILD, str(job.lock)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    try:
        owner.wait(30)
        with pytest.raises(LockHeld) as refusal:
            HeldLock(job.lock, "mine")
        assert f"a process that pid {owner.pid} on" in str(refusal.value)
        assert "left behind: end that one first" in str(refusal.value)
    finally:
        os.kill(child, signal.SIGKILL)
        owner.communicate()
