"""Jobs on real file systems: preempted and resumed to the bit, and owned by one run at a time.

``make test-storage`` prints what was mounted and what held.
"""

from __future__ import annotations

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
from tests import mounts
from tests.job import TINY, Job, environment

ONCE = ["ext4", "xfs", "btrfs", "overlay"]
TWICE = ["glusterfs", "sshfs", "s3fs"]
LONG = ("--epochs", "4", "--interval", "4", "--pause", "0.4")

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
        made.kind = kind
        held = ""
        if count == 2:
            made.locks = mounts.holds_flock(*made.places)
            held = f"; flock across mounts {'holds' if made.locks else 'does not hold'}"
        print(f"\n{kind}: {made.version}{held}")
        yield made


def of(root: Path, place: Path, *options: str) -> Job:
    """Return a job of two ranks in ``place``, whose other files are in ``root``."""
    job = Job(root, *options, "--trace", str(root / "trace"), "--digest", str(root / "digest"))
    job.directory = place / f"job-{root.name}"
    job.options = ["--grace", "15"]
    return job


def elsewhere(job: Job, place: Path) -> Job:
    """Return the same job as another host runs it, through another mount."""
    other = of(job.root, place, *job.arguments)
    other.prefix = mounts.as_another_host(job.root, "other")
    other.log = job.root / "other-log"
    return other


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of undisturbed runs, in a directory; by the number of epochs."""
    found = {}
    for epochs in ("2", "4"):
        root = tmp_path_factory.mktemp("undisturbed")
        with of(root, root, "--epochs", epochs) as job:
            assert job.start("--memory-dir", "off").wait() == 0, job.output()
        found[epochs] = (root / "digest").read_text()
    return found


def sealed(job: Job) -> dict[str, int]:
    """Return the run that sealed each checkpoint, by its name."""
    found = {}
    for path in scan(JobDirectory.at(job.directory)):
        manifest = read_manifest(path)
        found[path.name] = manifest.run
    return found


def command(*arguments: object, seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", *map(str, arguments)],
        capture_output=True, text=True, timeout=seconds, check=False, env=environment(),
    )  # fmt: skip


def check_all(job: Job, before: dict[str, int]) -> None:
    """Check that every checkpoint is intact, to the last byte, and none of ``before`` is gone."""
    found = command("verify", "--full", job.directory)
    assert found.returncode == 0, found
    assert sealed(job).items() >= before.items()


@pytest.mark.parametrize("fs", [*ONCE, *TWICE], indirect=True)
def test_a_preempted_job_continues_exactly(
    fs: mounts.Mounted, tmp_path: Path, expected: dict[str, str]
) -> None:
    """Where there is a second mount, as another host and through that one."""
    notice = ("--interval", "5", "--notice", "17:step", "--notice-file", str(tmp_path / "notice"))
    with of(tmp_path, fs.places[0], *notice) as job:
        assert job.start().wait() == 75, job.output()
        before = sealed(job)
        assert len(before) >= 4
        second = elsewhere(job, fs.places[1]) if len(fs.places) > 1 else job
        with second:
            assert second.start().wait() == 0, second.output()
            assert (tmp_path / "digest").read_text() == expected["2"]
            check_all(second, before)
        check_all(job, before)


@pytest.mark.parametrize("fs", TWICE, indirect=True)
def test_one_run_at_a_time_through_two_mounts(
    fs: mounts.Mounted, tmp_path: Path, expected: dict[str, str]
) -> None:
    """The second is refused while the first lives, and takes over once that one is silent."""
    calm = tmp_path / "calm"
    with of(tmp_path, fs.places[0], *LONG, "--calm", str(calm)) as first:
        first.start().until_step(6)
        with elsewhere(first, fs.places[1]) as refused:
            assert refused.start().wait(90) == 73, refused.output()
            assert "is alive: stop that one first" in refused.output()
        first.until_training()
        before = sealed(first)
        paused = first.tree()
        each(paused, psutil.Process.suspend)
        with elsewhere(first, fs.places[1]) as second:
            try:
                second.start()
                until(lambda: 2 in sealed(second).values(), second.output, 120)
            finally:
                calm.touch()
                each(paused, psutil.Process.resume)
            assert first.wait(60) == 73, first.output()
            assert "has taken over" in first.output()
            assert second.wait(120) == 0, second.output()
            assert (tmp_path / "digest").read_text() == expected["4"]
            check_all(second, before)
        check_all(first, before)
        runs = [run for _, run in sorted(sealed(first).items(), key=in_order)]
        assert runs == sorted(runs) and set(runs) == {1, 2}, runs


def until(condition: Callable[[], object], output: Callable[[], str], seconds: float) -> None:
    limit = time.monotonic() + seconds
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
