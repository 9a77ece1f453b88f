"""Preempted and killed at random moments, a job ends with the very bits of an undisturbed one."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.disturbances import KINDS, ON_A_SMALL_DISK, full_disk
from tests.job import TINY, Job, used_samples

SEED = int(os.environ.get("ELASTIC_CKPT_TEST_SEED", "20261123"))
COUNT = int(os.environ.get("ELASTIC_CKPT_TEST_DISTURBANCES", "30"))
STEPS_PER_EPOCH = 13  # 203 samples, batch 4, accumulation 2, 2 ranks


def make_job(directory: Path, epochs: int) -> Job:
    job = Job(
        directory,
        *("--epochs", str(epochs), "--interval", "7", "--pause", "0.004", "--workers", "1"),
        *("--trace", str(directory / "trace"), "--digest", str(directory / "digest")),
        script=TINY,
    )
    job.options = ["--max-failures", "1000", "--keep-last", "5"]
    return job


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """A file system of its own that can be filled; False where none can be made."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=256m,mode=700", "tmpfs", str(place)]
    made = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield made
        if made:  # what is looked at afterwards
            shutil.copytree(place, place.with_name("kept"), symlinks=True)
    finally:
        if made:
            subprocess.run(["umount", str(place)], check=True)


@pytest.mark.timeout(0)  # each wait has its own bound, and make chaos has no end in minutes
def test_disturbances_leave_no_trace(tmp_path, count=COUNT):
    dice = random.Random(SEED)
    print(f"seed {SEED}, {count} disturbances; to replay: make chaos SEED={SEED} N={count}")
    epochs = 30 + count  # so that the last ones still find it running
    total = epochs * STEPS_PER_EPOCH
    with make_job(tmp_path / "calm", epochs) as calm:
        assert calm.start().wait(120 + count) == 0
    moments = sorted(dice.randrange(1, count * STEPS_PER_EPOCH) for _ in range(count))
    place = tmp_path / "wild"
    with small_disk(place / "job") as small, make_job(place, epochs) as wild:
        possible = ON_A_SMALL_DISK if small else KINDS
        kinds = [kind for kind in possible for _ in range(-(-count // len(possible)))]
        dice.shuffle(kinds)
        wild.start()
        for number, (moment, kind) in enumerate(zip(moments, kinds, strict=False), 1):
            wild.until_training()
            wild.until_step(moment)
            print(f"{number} of {count}, step {moment}: {kind.__name__}", flush=True)
            assert belonging_to(wild) and directories_of(wild)  # they can be seen while it runs
            kind(wild, dice)
        code = wild.wait(120 + count)
        assert (code if code not in (75, 76) else wild.finish()) == 0, wild.output()
        assert wild.tiers() == []
        assert belonging_to(wild) == []
        assert directories_of(wild) == []
    expected = used_samples(tmp_path / "calm" / "trace", 2)
    assert len(expected) == 2 * total
    assert used_samples(tmp_path / "wild" / "trace", 2) == expected
    digests = [(tmp_path / name / "digest").read_text() for name in ("calm", "wild")]
    assert digests[0] == digests[1]
    job = place / ("kept" if small else "job")
    assert not list((job / ".attempts").iterdir())
    fills = kinds[:count].count(full_disk)
    assert torn_lines(job) <= 3 * fills  # a write that found no more room, of each process


def belonging_to(job: Job) -> list[psutil.Process]:
    """Processes that still work for a job, by what they were told."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("ELASTIC_CKPT_DIR") == str(job.directory):
                found.append(process)
    return found


def directories_of(job: Job) -> list[Path]:
    """Directories for sockets and FIFOs that runs of a job have left."""
    found = []
    for owner in Path(tempfile.gettempdir()).glob("eckpt-*/supervisor.json"):
        with contextlib.suppress(OSError):  # another test's, which goes at this moment
            if json.loads(owner.read_text())["pid"] in job.started:
                found.append(owner.parent)
    return found


def torn_lines(job: Path) -> int:
    """Lines of the journal that nobody can read; all others are whole."""
    torn = 0
    for path in (job / ".elastic-ckpt" / "journal").iterdir():
        for line in filter(None, path.read_text().splitlines()):
            try:
                json.loads(line)
            except ValueError:
                torn += 1
    return torn


def test_every_sample_of_an_epoch_is_used_once(tmp_path):
    with make_job(tmp_path, 1) as job:
        assert job.start().wait(120) == 0
    samples = [
        index for _, used, _ in used_samples(tmp_path / "trace", 2).values() for index in used
    ]
    # 203 samples on 2 ranks: one is repeated so that both have 102.
    assert sorted(set(samples)) == list(range(203))
    assert len(samples) == 204
