"""Jobs on real file systems: preempted and resumed to the bit, and owned by one run at a time.

``make test-storage`` prints what was mounted and what held.
"""

from __future__ import annotations

import copy
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from elastic_ckpt.checkpoint.catalog import scan
from elastic_ckpt.checkpoint.verify import read_manifest
from elastic_ckpt.jobdir.paths import JobDirectory
from tests import mounts, nfs_guest
from tests.job import START_SECONDS, Job, environment, is_one_error

GIVEN = mounts.GIVEN.split(":")[0]  # in a guest, which has one kind alone
ONCE = [] if GIVEN else ["ext4", "xfs", "btrfs", "overlay"]
TWICE = [GIVEN] if GIVEN else ["glusterfs", "sshfs"]
LONG = ("--interval", "4", "--pause", "1.5" if GIVEN else "0.4")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def fs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A file system of the parameter's kind, mounted twice if it can be shared."""
    kind = request.param
    why = mounts.why_not(kind)
    if why:
        pytest.skip(why)
    count = 1 if kind in ONCE else 2
    with mounts.mounted(kind, tmp_path_factory.mktemp(kind), count) as made:
        held = ""
        if count == 2:
            holds = mounts.holds_flock(*made.places)
            held = f"; flock across mounts {'holds' if holds else 'does not hold'}"
        print(f"\n{kind}: {made.version}{held}")
        yield made


def of(root: Path, place: Path, *options: str) -> Job:
    """Return a job of two ranks in ``place``, whose other files are in ``root``."""
    files = ("--trace", str(root / "trace"), "--digest", str(root / "digest"))
    job = Job(root, "--epochs", "3", *options, *files)
    job.directory = place / f"job-{root.name}"
    job.options = ["--grace", "90" if GIVEN else "15"]  # a guest is slow
    return job


def elsewhere(job: Job, place: Path) -> Job:
    """Return the same job as another host runs it, through another mount."""
    other = copy.copy(job)
    other.directory = place / job.directory.name
    other.process = None
    other.prefix = mounts.as_another_host(job.root, "other")
    other.log = job.root / "other-log"
    return other


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of an undisturbed run, in a directory."""
    given = os.environ.get("ELASTIC_CKPT_TEST_DIGEST")
    if given:
        return given
    root = tmp_path_factory.mktemp("undisturbed")
    with of(root, root) as job:
        assert job.start("--memory-dir", "off").wait() == 0, job.output()
    return (root / "digest").read_text()


def sealed(job: Job) -> dict[str, int]:
    """Return the run that sealed each checkpoint, by its name."""
    found = {}
    for path in scan(JobDirectory.at(job.directory)):
        manifest = read_manifest(path)
        found[path.name] = manifest.run
    return found


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", *map(str, arguments)],
        capture_output=True, text=True, timeout=START_SECONDS, check=False, env=environment(),
    )  # fmt: skip


def check_all(job: Job, before: dict[str, int]) -> None:
    """Check that every checkpoint is intact, to the last byte, and none of ``before`` is gone."""
    found = command("verify", "--full", job.directory)
    assert found.returncode == 0, found
    assert sealed(job).items() >= before.items()


@pytest.mark.parametrize("fs", [*ONCE, *TWICE], indirect=True)
def test_a_preempted_job_continues_exactly(
    fs: mounts.Mounted, tmp_path: Path, expected: str
) -> None:
    """Where there is a second mount, as another host and through that one."""
    notice = ("--interval", "5", "--notice", "17:step", "--notice-file", str(tmp_path / "notice"))
    with of(tmp_path, fs.places[0], *notice) as job:
        assert job.start().wait() == 75, job.output()
        before = sealed(job)
        assert len(before) >= 4, job.output()
        second = elsewhere(job, fs.places[1]) if len(fs.places) > 1 else job
        with second:
            assert second.start().wait() == 0, second.output()
            assert (tmp_path / "digest").read_text() == expected
            check_all(second, before)
        check_all(job, before)


@pytest.mark.parametrize("fs", TWICE, indirect=True)
def test_one_run_at_a_time_through_two_mounts(
    fs: mounts.Mounted, tmp_path: Path, expected: str
) -> None:
    """The second is refused while the first lives, and takes over once that one is silent."""
    calm = tmp_path / "calm"
    with of(tmp_path, fs.places[0], *LONG, "--calm", str(calm)) as first:
        first.start().until_step(6)
        with elsewhere(first, fs.places[1]) as refused:
            assert refused.start().wait() == 73, refused.output()
            assert "is alive: stop that one first" in refused.output()
        first.until_training()
        before = sealed(first)
        paused = first.tree()
        each(paused, psutil.Process.suspend)
        with elsewhere(first, fs.places[1]) as second:
            try:
                second.start()
                until(lambda: 2 in sealed(second).values(), second.output)
            finally:
                calm.touch()
                each(paused, psutil.Process.resume)
            assert first.wait() == 73, first.output()
            assert "has taken over" in first.output()
            assert second.wait() == 0, second.output()
            assert (tmp_path / "digest").read_text() == expected
            check_all(second, before)
        check_all(first, before)
        runs = [run for _, run in sorted(sealed(first).items(), key=in_order)]
        assert runs == sorted(runs) and set(runs) == {1, 2}, runs


@pytest.mark.skipif(bool(GIVEN), reason="the guest's file systems are given")
@pytest.mark.parametrize("fs", ["s3fs"], indirect=True)
def test_a_bucket_mounted_as_a_directory_is_refused(fs: mounts.Mounted, tmp_path: Path) -> None:
    """No save on this mount is ever sealed, as modes of directories cannot be set; a run that only
    warned of it would train for nothing."""
    with of(tmp_path, fs.places[0]) as job:
        assert job.start().wait() == 73, job.output()
        lines = job.output().splitlines()
        assert is_one_error(lines) and "is on fuse.s3fs" in lines[0], lines
        assert not job.directory.exists()


@pytest.mark.skipif(not GIVEN.startswith("nfs"), reason="of the guest with NFS")
@pytest.mark.parametrize("fs", TWICE, indirect=True)
def test_a_directory_that_the_server_has_made_anew(
    fs: mounts.Mounted, tmp_path: Path, expected: str
) -> None:
    """As from a backup: what the job has open is stale. It continues in what is there now."""
    calm = tmp_path / "calm"
    with of(tmp_path, fs.places[0], *LONG, "--calm", str(calm)) as job:
        job.start().until(lambda view: len(sealed(job)) >= 2, "two checkpoints")
        before = sealed(job)
        paused = job.tree()
        each(paused, psutil.Process.suspend)
        assert fs.exported is not None
        there = fs.exported / job.directory.name
        shutil.copytree(there, fs.exported / "backup", symlinks=True)
        shutil.rmtree(there)
        (fs.exported / "backup").rename(there)
        each(paused, psutil.Process.resume)
        until(lambda: len(sealed(job)) > len(before), job.output)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()
        print(job.output())
        check_all(job, before)
        calm.touch()
        with elsewhere(job, fs.places[1]) as second:
            assert second.start().wait() == 0, second.output()
            assert (tmp_path / "digest").read_text() == expected
            check_all(second, before)


def until(condition: Callable[[], object], output: Callable[[], str]) -> None:
    limit = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < limit, output()
        time.sleep(0.2)


def in_order(item: tuple[str, int]) -> tuple[int, ...]:
    """Order checkpoints by epoch and step."""
    return tuple(int(part.partition("-")[2]) for part in item[0].split("_"))


def each(processes: list[psutil.Process], do) -> None:
    for process in processes:
        try:
            do(process)
        except psutil.NoSuchProcess:
            continue


@pytest.mark.timeout(3600)
@pytest.mark.skipif(bool(GIVEN), reason="this is the guest")
@pytest.mark.parametrize("version", ["4.2", "3"])
def test_nfs_in_a_guest(version: str, tmp_path: Path, expected: str) -> None:
    """All tests of this file that take two mounts, with an NFS server and two clients."""
    why = nfs_guest.why_not()
    if why:
        pytest.skip(why)
    variables = environment() | {
        "ELASTIC_CKPT_TEST_MOUNTS": f"nfs{version}:/run/nfs-0:/run/nfs-1:/run/export",
        "ELASTIC_CKPT_TEST_DIGEST": expected,
        "ELASTIC_CKPT_TEST_PATIENCE": "5",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    names = [name for name in variables if name.startswith(("ELASTIC_", "PYTHON"))]
    settings = [f"export {name}={shlex.quote(variables[name])}" for name in names]
    tests = f"{sys.executable} -m pytest -s -x -p no:cacheprovider"
    tests += f" --basetemp=/run/tmp/tests tests/system/test_filesystems.py -k nfs{version}"
    commands = [
        *settings,
        "uname -r",
        "grep nfs /proc/mounts",
        tests,
        "ended=$?",
        "cat /proc/fs/nfsd/clients/*/info",
        "exit $ended",
    ]
    print(f"\n{nfs_guest.run(tmp_path, version, chr(10).join(commands), 3000)}")
