"""Preempted and killed at random moments, a job ends with the same bits as an undisturbed one."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.disturbances import (
    KINDS,
    ON_A_SMALL_DISK,
    Disturbance,
    corrupt_the_newest_checkpoint,
    full_disk,
    kill_worker,
    term_supervisor,
)
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
    """Mount a file system that can be filled; yield False where that is not possible."""
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


@pytest.mark.one_torch  # with another torch the disturbances below include these
def test_preempted_killed_and_corrupted_the_job_ends_with_the_same_bits(tmp_path):
    """One disturbance of each kind from which a job recovers in a different way."""
    kinds = [term_supervisor, kill_worker, corrupt_the_newest_checkpoint]
    check_bits(
        tmp_path,
        9,
        [(9 + 13 * number, kind) for number, kind in enumerate(kinds)],
        random.Random(SEED),
    )


@pytest.mark.slow
@pytest.mark.timeout(0)  # each wait has its own bound, and make chaos takes as long as it takes
def test_disturbances_leave_no_trace(tmp_path, count=COUNT):
    dice = random.Random(SEED)
    print(f"seed {SEED}, {count} disturbances; to replay: make chaos SEED={SEED} N={count}")
    moments = sorted(dice.randrange(1, count * STEPS_PER_EPOCH) for _ in range(count))
    place = tmp_path / "wild"
    with small_disk(place / "job") as small:
        possible = ON_A_SMALL_DISK if small else KINDS
        kinds = [kind for kind in possible for _ in range(-(-count // len(possible)))]
        dice.shuffle(kinds)
        planned = list(zip(moments, kinds, strict=False))
        # More epochs than disturbances, so that the last ones still find the job running.
        check_bits(tmp_path, 30 + count, planned, dice)
    fills = kinds[:count].count(full_disk)
    # A write that found no room can tear a line, one for each process.
    assert torn_lines(place / ("kept" if small else "job")) <= 3 * fills


def check_bits(
    directory: Path, epochs: int, planned: list[tuple[int, Disturbance]], dice: random.Random
) -> None:
    """Run a job with and without the disturbances and compare its samples and parameters."""
    seconds = 120 + len(planned)
    with make_job(directory / "calm", epochs) as calm:
        assert calm.start().wait(seconds) == 0
    with make_job(directory / "wild", epochs) as wild:
        wild.start()
        for number, (moment, kind) in enumerate(planned, 1):
            wild.until_training()
            wild.until_step(moment)
            print(f"{number} of {len(planned)}, step {moment}: {kind.__name__}", flush=True)
            assert belonging_to(wild) and directories_of(wild)  # visible while the job runs
            kind(wild, dice)
        code = wild.wait(seconds)
        assert (code if code not in (75, 76) else wild.finish()) == 0, wild.output()
        assert wild.tiers() == []
        assert belonging_to(wild) == []
        assert directories_of(wild) == []
        assert not list((wild.directory / ".attempts").iterdir())
    expected = used_samples(directory / "calm" / "trace", 2)
    assert len(expected) == 2 * epochs * STEPS_PER_EPOCH
    assert used_samples(directory / "wild" / "trace", 2) == expected
    digests = [(directory / name / "digest").read_text() for name in ("calm", "wild")]
    assert digests[0] == digests[1]
    # 203 samples on 2 ranks: one is repeated so that both have 102.
    samples = Counter(index for epoch, used, _ in expected.values() if epoch == 0 for index in used)
    assert set(samples) == set(range(203)) and samples.total() == 204


def belonging_to(job: Job) -> list[psutil.Process]:
    """Return the processes that still work for a job, by their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("ELASTIC_CKPT_DIR") == str(job.directory):
                found.append(process)
    return found


def directories_of(job: Job) -> list[Path]:
    """Return the directories for sockets and FIFOs that runs of a job have left."""
    found = []
    for owner in Path(tempfile.gettempdir()).glob("eckpt-*/supervisor.json"):
        with contextlib.suppress(OSError):  # another test removes its own at this moment
            if json.loads(owner.read_text())["pid"] in job.started:
                found.append(owner.parent)
    return found


def torn_lines(job: Path) -> int:
    """Count the journal's lines that are not valid JSON."""
    torn = 0
    for path in (job / ".elastic-ckpt" / "journal").iterdir():
        for line in filter(None, path.read_text().splitlines()):
            try:
                json.loads(line)
            except ValueError:
                torn += 1
    return torn
