"""File systems that fill up, turn read-only, hang or go away while a job runs.

What was sealed stays, what is said is true, and the rerun continues exactly.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import mounts
from tests.job import Job
from tests.system.test_filesystems import GIVEN, LONG, check_all, command, of, sealed, until
from tests.system.test_filesystems import expected as expected

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(GIVEN), reason="the guest's file systems are given"),
]


@contextlib.contextmanager
def filled(place: Path) -> Iterator[None]:
    """Leave no byte on a disk."""
    path = place / "filler"
    with open(path, "wb", buffering=0) as file:
        for size in (mounts.MB, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
        with contextlib.suppress(OSError):
            os.fsync(file.fileno())
    yield
    path.unlink()


@contextlib.contextmanager
def read_only(place: Path) -> Iterator[None]:
    """Turn it read-only as the kernel does after an error; a repair mounts it again."""
    mounts.run("mount", "-o", "remount,abort", str(place))
    yield
    again(place)


@contextlib.contextmanager
def broken(place: Path) -> Iterator[None]:
    """Stop it as the kernel does when its device fails: reads fail as well."""
    mounts.run("xfs_io", "-x", "-c", "shutdown", str(place))
    yield
    again(place)


def again(place: Path) -> None:
    mounts.unmount(place)
    mounts.run("mount", "-o", "loop", str(place.with_name("image")), str(place))


@contextlib.contextmanager
def over_quota(place: Path) -> Iterator[None]:
    """Limit the job's directory, a subvolume, to less than it uses."""
    job = next(place.glob("job-*"))
    mounts.run("btrfs", "quota", "enable", str(place))
    mounts.run("btrfs", "quota", "rescan", "-w", str(place))
    mounts.run("btrfs", "qgroup", "limit", "1", str(job))
    yield
    mounts.run("btrfs", "quota", "disable", str(place))


FULL = ("No space left on device", " Bytes free")
QUOTA = ("Disk quota exceeded",)
READ_ONLY = ("Read-only file system",)
BROKEN = ("Input/output error",)


@pytest.mark.parametrize(
    ("fault", "kind", "reasons", "memory"),
    [
        pytest.param(filled, "ext4", FULL, True, id="full-ext4-memory"),
        pytest.param(filled, "btrfs", FULL, False, id="full-btrfs"),
        pytest.param(over_quota, "btrfs", QUOTA, True, id="quota-btrfs-memory"),
        pytest.param(read_only, "ext4", READ_ONLY, False, id="read-only-ext4"),
        pytest.param(broken, "xfs", BROKEN, True, id="broken-xfs-memory"),
    ],
)
def test_a_disk_that_takes_nothing(
    fault: Callable, kind: str, reasons: tuple[str, ...], memory: bool, tmp_path: Path,
    expected: str,
) -> None:  # fmt: skip
    """Saves fail and the job trains on; a notice does not say saved; the rerun is exact."""
    if why := mounts.why_not(kind):
        pytest.skip(why)
    place = tmp_path / "mounted"
    place.mkdir()
    job = of(tmp_path, place, *LONG, "--calm", str(tmp_path / "calm"))
    job.options += [] if memory else ["--memory-dir", "off"]
    with mounts.disk(kind, tmp_path / "image", place, 400 if kind == "xfs" else 128), job:
        if kind == "btrfs":
            mounts.run("btrfs", "subvolume", "create", str(job.directory))
        job.start().until(lambda view: len(sealed(job)) >= 2, "two checkpoints")
        before, step = sealed(job), steps(job)
        with fault(place):
            until(
                lambda: steps(job) >= step + 6, job.output
            )  # it trains on, and has failed to save
            job.process.send_signal(signal.SIGTERM)
            assert job.wait() == 76, job.output()
            print(job.output())
            assert any(reason in job.output() for reason in reasons), job.output()
            said = 0
            if fault is not broken:  # what is on it can be read
                said = promised(job)
                assert (said >= step + 6) == memory, job.output()
                check_all(job, before)
        (tmp_path / "calm").touch()
        assert job.start().wait() == 0, job.output()
        assert loaded(job) >= said, job.output()
        assert (loaded(job) >= step + 6) == memory, job.output()
        assert (tmp_path / "digest").read_text() == expected
        check_all(job, before)


def test_a_file_server_that_hangs(tmp_path: Path, expected: str) -> None:
    """What is asked of a directory there says so and ends; a start waits, and hears a signal."""
    if why := mounts.why_not("bindfs"):
        pytest.skip(why)
    with mounts.mounted("bindfs", tmp_path / "fs") as fs:
        job = of(tmp_path, fs.places[0], *LONG, "--calm", str(tmp_path / "calm"))
        with job:
            fs.stop_answering(0)
            try:
                job.start()
                until(lambda: "does not answer: waiting up to" in job.output(), job.output)
                job.process.send_signal(signal.SIGTERM)
                assert job.wait() == 76, job.output()
                assert "nothing was started" in job.output()
            finally:
                fs.answer(0)
            job.start().until(lambda view: len(sealed(job)) >= 2, "two checkpoints")
            before = sealed(job)
            fs.stop_answering(0)
            try:
                for name in ("status", "list"):
                    asked = command(name, job.directory)
                    assert asked.returncode == 73, asked
                    assert f"{job.directory} has not answered for" in asked.stderr, asked
                job.process.send_signal(signal.SIGTERM)
                assert job.wait() == 76, job.output()
                assert "the storage does not answer" in job.output()
            finally:
                fs.answer(0)
            print(job.output())
            (tmp_path / "calm").touch()
            assert job.start().wait() == 0, job.output()
            assert (tmp_path / "digest").read_text() == expected
            check_all(job, before)


@pytest.mark.parametrize("kind", ["sshfs", "glusterfs"])
def test_a_mount_that_goes_and_comes_back(kind: str, tmp_path: Path, expected: str) -> None:
    """The job trains on, and saves to the disk again once that is there."""
    if why := mounts.why_not(kind):
        pytest.skip(why)
    with mounts.mounted(kind, tmp_path / "fs") as fs:
        job = of(tmp_path, fs.places[0], *LONG, "--calm", str(tmp_path / "calm"))
        with job:
            job.start().until(lambda view: len(sealed(job)) >= 2, "two checkpoints")
            before, step = sealed(job), steps(job)
            fs.take_away(0)
            until(lambda: steps(job) >= step + 6, job.output)
            assert command("status", job.directory).returncode == 73
            fs.bring_back(0)
            until(lambda: len(sealed(job)) > len(before), job.output)
            job.process.send_signal(signal.SIGTERM)
            assert job.wait() == 75, job.output()
            print(job.output())
            (tmp_path / "calm").touch()
            assert job.start().wait() == 0, job.output()
            assert loaded(job) >= step + 6
            assert (tmp_path / "digest").read_text() == expected
            check_all(job, before)


def steps(job: Job) -> int:
    """Return the steps that rank 0 has finished; looks at no file of the job."""
    path = job.root / "trace.0"
    return len(path.read_text().splitlines()) if path.exists() else 0


def promised(job: Job) -> int:
    """Return the step that the end of a run says a rerun resumes from."""
    said = re.findall(r"it resumes from step ([0-9]+)", job.output())
    assert said, job.output()
    return int(said[-1])


def loaded(job: Job) -> int:
    """Return the step that the last incarnation resumed from."""
    return [event["data"]["step"] for event in job.events() if event["event"] == "loaded"][-1]
