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
from tests.system.test_filesystems import GIVEN, LONG, check_all, command, of, sealed
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
    """Turn it read-only as the kernel does after an error."""
    mounts.run("mount", "-o", "remount,ro", str(place))
    yield
    mounts.run("mount", "-o", "remount,rw", str(place))


@contextlib.contextmanager
def over_quota(place: Path) -> Iterator[None]:
    """Limit the job's directory to what it uses: a project of xfs, a subvolume of btrfs."""
    kind = mounts.run("stat", "-f", "-c", "%T", str(place)).strip()
    job = next(place.glob("job-*"))
    if kind == "btrfs":
        mounts.run("btrfs", "quota", "enable", str(place))
        mounts.run("btrfs", "quota", "rescan", "-w", str(place))
        mounts.run("btrfs", "qgroup", "limit", "1", str(job))
        yield
        mounts.run("btrfs", "qgroup", "limit", "none", str(job))
        return
    quota = ["xfs_quota", "-x", "-c"]
    mounts.run(*quota, f"project -s -p {job} 7", str(place))
    mounts.run(*quota, "limit -p bhard=4k ihard=1 7", str(place))
    yield
    mounts.run(*quota, "limit -p bhard=0 ihard=0 7", str(place))


FULL = ("No space left on device", " Bytes free")
QUOTA = ("Disk quota exceeded",)
READ_ONLY = ("Read-only file system",)


@pytest.mark.parametrize(
    ("fault", "kind", "reasons", "memory"),
    [
        (filled, "ext4", FULL, True),
        (filled, "btrfs", FULL, False),
        (over_quota, "xfs", QUOTA, False),
        (over_quota, "btrfs", QUOTA, True),
        (read_only, "ext4", READ_ONLY, False),
        (read_only, "xfs", READ_ONLY, True),
    ],
    ids=lambda value: getattr(value, "__name__", value) if not isinstance(value, tuple) else "",
)
def test_a_disk_that_takes_nothing(
    fault: Callable, kind: str, reasons: tuple[str, ...], memory: bool, tmp_path: Path,
    expected: str,
) -> None:  # fmt: skip
    """Saves fail and the job trains on; a notice does not say saved; the rerun is exact."""
    if why := mounts.why_not(kind):
        pytest.skip(why)
    place, calm = tmp_path / "mounted", tmp_path / "calm"
    place.mkdir()
    size, options = (400, "prjquota") if kind == "xfs" else (128, "")
    job = of(tmp_path, place, *LONG, "--calm", str(calm))
    job.options += [] if memory else ["--memory-dir", "off"]
    with mounts.disk(kind, tmp_path / "image", place, size, options), job:
        if kind == "btrfs":
            mounts.run("btrfs", "subvolume", "create", str(job.directory))
        job.start().until(lambda view: len(sealed(job)) >= 2, "two checkpoints")
        with fault(place):
            before = sealed(job)
            step = job.view().position.step
            job.until_step(step + 6)
            job.process.send_signal(signal.SIGTERM)
            assert job.wait() == 76, job.output()
            print(job.output())
            assert any(reason in job.output() for reason in reasons), job.output()
            said = re.search(r"it resumes from step ([0-9]+)", job.output())
            assert said is not None, job.output()
            assert (int(said[1]) >= step + 6) == memory, job.output()
            check_all(job, before)
            assert "preempted" in command("status", job.directory).stdout
        calm.touch()
        assert job.start().wait() == 0, job.output()
        assert loaded(job) == int(said[1]), job.output()
        assert (tmp_path / "digest").read_text() == expected
        check_all(job, before)


def loaded(job: Job) -> int:
    """Return the step that the last incarnation resumed from."""
    return [event["data"]["step"] for event in job.events() if event["event"] == "loaded"][-1]
