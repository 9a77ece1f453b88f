"""Preempted and killed at random moments, a job ends with the same bits as an undisturbed one."""

import contextlib
import json
import os
import random
import tempfile
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.faults.disturbances import (
    KINDS,
    Disturbance,
    corrupt_the_newest_checkpoint,
    full_disk,
    kill_a_child_of_the_data_loader,
    kill_worker,
    stop_and_continue,
    term_agent_and_worker,
    term_supervisor,
)
from tests.faults.surroundings import (
    AROUND,
    ON_MOUNTS,
    disk_away_and_back,
    lock_lost,
    memory_full,
    nothing_reads_the_output,
    rank_leaves_with_0,
)
from tests.faults.wild import Place, WildJob, place
from tests.job import Job, used_samples

WITHOUT_A_START = [
    kill_worker, term_agent_and_worker, stop_and_continue, kill_a_child_of_the_data_loader,
    nothing_reads_the_output, lock_lost, rank_leaves_with_0, full_disk, memory_full,
    disk_away_and_back,
]  # fmt: skip
SEED = int(os.environ.get("ELASTIC_CKPT_TEST_SEED", "20261123"))
COUNT = int(os.environ.get("ELASTIC_CKPT_TEST_DISTURBANCES", "30"))
ONLY = os.environ.get("ELASTIC_CKPT_TEST_KINDS", "")
STEPS_PER_EPOCH = 13  # 203 samples, batch 4, accumulation 2, 2 ranks


def make_job(directory: Path, epochs: int, own: Place | None = None) -> WildJob:
    job = WildJob(
        directory,
        *("--epochs", str(epochs), "--interval", "7", "--pause", "0.012", "--workers", "1"),
        *("--trace", str(directory / "trace"), "--digest", str(directory / "digest")),
        place=own,
    )
    job.options += ["--max-failures", "1000", "--keep-last", "5"]
    return job


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
    with place(tmp_path / "place") as own:
        possible = [*KINDS, *AROUND, *(ON_MOUNTS if own else [])]
        if ONLY:
            possible = [kind for kind in possible if kind.__name__ in ONLY.split(",")]
        possible += [kind for kind in possible if kind in WITHOUT_A_START]  # those cost little
        kinds = [kind for kind in possible for _ in range(-(-count // len(possible)))]
        dice.shuffle(kinds)
        planned = list(zip(moments, kinds, strict=False))
        # More epochs than disturbances, so that the last ones still find the job running: it trains
        # on while they wait for something.
        check_bits(tmp_path, 60 + 2 * count, planned, dice, own)
    fills = kinds[:count].count(full_disk)
    # A write that found no room can tear a line, one for each process.
    assert torn_lines(tmp_path / ("place/kept" if own else "wild/job")) <= 3 * fills


def check_bits(
    directory: Path,
    epochs: int,
    planned: list[tuple[int, Disturbance]],
    dice: random.Random,
    own: Place | None = None,
) -> None:
    """Run a job with and without the disturbances and compare its samples and parameters."""
    seconds = 300 + 2 * len(planned)  # other work may slow it down
    calm = undisturbed(directory, epochs, seconds)
    with make_job(directory / "wild", epochs, own) as wild:
        wild.start()
        for number, (moment, kind) in enumerate(planned, 1):
            wild.until_training()
            wild.until_step(moment)
            print(f"{number} of {len(planned)}, step {moment}: {kind.__name__}", flush=True)
            assert belonging_to(wild) and directories_of(wild)  # visible while the job runs
            kind(wild, dice)
        wild.calm.touch()
        code = wild.wait(seconds)
        assert (code if code not in (75, 76) else wild.finish()) == 0, wild.output()
        assert wild.tiers() == []
        assert belonging_to(wild) == []
        assert directories_of(wild) == []
        assert not list((wild.directory / ".attempts").iterdir())
    expected = used_samples(calm / "trace", 2)
    assert len(expected) == 2 * epochs * STEPS_PER_EPOCH
    assert used_samples(directory / "wild" / "trace", 2) == expected
    digests = [(one / "digest").read_text() for one in (calm, directory / "wild")]
    assert digests[0] == digests[1]
    # 203 samples on 2 ranks: one is repeated so that both have 102.
    samples = Counter(index for epoch, used, _ in expected.values() if epoch == 0 for index in used)
    assert set(samples) == set(range(203)) and samples.total() == 204


def undisturbed(directory: Path, epochs: int, seconds: float) -> Path:
    """Return where an undisturbed run left its trace; `make chaos` keeps it for further rounds."""
    calm = Path(os.environ.get("ELASTIC_CKPT_TEST_CALM", directory)) / f"calm-{epochs}"
    if not (calm / "digest").exists():
        with make_job(calm, epochs) as job:
            job.calm.touch()
            assert job.start().wait(seconds) == 0, job.output()
    return calm


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
