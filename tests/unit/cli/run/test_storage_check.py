"""What ``run`` says about the storage at its start, and when it refuses it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elastic_ckpt.cli.doctor import storage_trial
from elastic_ckpt.cli.run import storage_check
from elastic_ckpt.cli.run.storage_check import check_storage
from elastic_ckpt.errors import DirectoryUnusable
from tests.job import environment


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    place = tmp_path / "proc"
    (place / "self").mkdir(parents=True)
    return place


def mount(proc: Path, kind: str, options: str = "rw") -> None:
    """Let all directories be on a file system of this kind."""
    (proc / "self/mountinfo").write_text(f"27 1 0:9 / / rw - {kind} source {options}\n")


def fail(monkeypatch: pytest.MonkeyPatch, what: str, error: OSError | None) -> None:
    def trial(_: Path) -> None:
        raise error or storage_trial._TrialFailed("the wrong effect")

    monkeypatch.setattr(storage_trial, "TRIALS", {**storage_trial.TRIALS, what: trial})


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("ext4", "rw,nobarrier", "nobarrier: a crash or power cut can lose sealed checkpoints"),
        ("btrfs", "rw,nobarrier", "mount -o remount,barrier /"),
        ("overlay", "rw,volatile", "volatile: a crash"),
        ("ext4", "rw,barrier=0", "barrier=0: a crash or power cut can lose sealed checkpoints"),
        ("jfs", "rw,nointegrity", "nointegrity: a crash or power cut"),
        ("f2fs", "rw,fsync_mode=nobarrier", "remount it with fsync_mode=posix"),
        ("ext4", "rw,data=writeback", "data=writeback: sealed checkpoints are safe, but"),
        ("nfs4", "rw,soft", "mount it with hard instead of soft"),
        ("overlay", "rw", "is lost with the container: mount a volume"),
        ("fuse.rclone", "rw", "an object store without atomic renames"),
        ("nfs", "rw,nolock", "nodes do not see each other's locks: mount it without nolock"),
        ("fuse.odd", "rw", "is not in the list of known types"),
    ],
)
def test_a_doubtful_mount_is_said_in_one_line(
    proc: Path, kind: str, options: str, says: str
) -> None:
    mount(proc, kind, options)
    found = check_storage(proc.parent / "job", proc)
    assert found.startswith(f"warning: {proc.parent}/job: {kind} (source on /)")
    assert says in found and "\n" not in found


@pytest.mark.parametrize(
    ("kind", "options"), [("ext4", "rw"), ("xfs", "rw"), ("nfs4", "rw"), ("ext4", "ro,nobarrier")]
)
def test_a_sound_mount_is_not_mentioned(proc: Path, kind: str, options: str) -> None:
    mount(proc, kind, options)
    assert check_storage(proc.parent / "job", proc) == ""
    assert sorted(path.name for path in proc.parent.iterdir()) == ["proc"]


@pytest.mark.parametrize("what", ["rename", "fsync", "O_EXCL"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSYS, "Function not implemented"), None])
def test_storage_on_which_no_checkpoint_survives_is_refused(
    proc: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: OSError | None
) -> None:
    mount(proc, "fuse.rclone")
    fail(monkeypatch, what, error)
    with pytest.raises(DirectoryUnusable) as caught:
        check_storage(proc.parent / "job", proc)
    reason = "Function not implemented" if error else "the wrong effect"
    assert f"is on fuse.rclone (source), where {what} failed: {reason}" in str(caught.value)
    assert "use a directory on another file system" in str(caught.value)


@pytest.mark.parametrize(
    ("what", "error"),
    [("locks", None), ("rename", OSError(errno.ENOSPC, "No space left on device"))],
)
def test_storage_that_may_do_is_not_refused(
    proc: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: OSError | None
) -> None:
    mount(proc, "nfs4")
    fail(monkeypatch, what, error)
    assert f"{what}: " in check_storage(proc.parent / "job", proc)


def test_storage_that_does_not_answer_delays_a_run_by_a_bound(
    proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount(proc, "nfs4")
    monkeypatch.setattr(storage_check, "TRIAL_SECONDS", 0.2)
    monkeypatch.setattr(storage_trial, "TRIALS", {"fsync": lambda _: time.sleep(60)})
    assert check_storage(proc.parent / "job", proc) == ""


def test_an_unwritable_directory_is_left_to_the_run(proc: Path) -> None:
    mount(proc, "nfs4")
    assert check_storage(Path("/proc/sys"), proc) == ""
    (proc / "self/mountinfo").unlink()
    assert check_storage(proc.parent / "job", proc) == ""


REFUSES = """
import errno, os
from elastic_ckpt.cli.doctor import filesystem
from elastic_ckpt.cli.run import storage_check
mount = filesystem.Mount("/", "fuse.rclone", "bucket:", frozenset({"rw"}))
storage_check.mount_of = filesystem.mount_of = lambda *_: mount
def rename(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
os.rename = rename
from elastic_ckpt.cli.app import main
main()
"""


def test_run_refuses_a_mount_without_renames_before_it_writes_there(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", REFUSES, "run", "--dir", "job", "--nproc", "1", "train.py"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 73, done.stderr
    assert "where rename failed: Function not implemented" in done.stderr
    assert "\nelastic-ckpt: next: see what is wrong with it" in done.stderr
    assert done.stderr.count("\n") == 4
    assert os.listdir(tmp_path) == ["train.py"]
