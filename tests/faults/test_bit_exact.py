"""Preempted and killed at random moments, a job ends with the very bits of an undisturbed one."""

import os
import random
import signal
from pathlib import Path

import psutil
import pytest

from tests.job import TINY, Job, survivors, used_samples

SEED = int(os.environ.get("ELASTIC_CKPT_TEST_SEED", "20261123"))
DISTURBANCES = os.environ.get("ELASTIC_CKPT_TEST_DISTURBANCES")
COUNTS = [6, pytest.param(20, marks=pytest.mark.faults_full)]
EPOCHS = 12
STEPS_PER_EPOCH = 13  # 203 samples, batch 4, accumulation 2, 2 ranks


def make_job(directory: Path) -> Job:
    job = Job(
        directory,
        *("--epochs", str(EPOCHS), "--interval", "7", "--pause", "0.004"),
        *("--trace", str(directory / "trace"), "--digest", str(directory / "digest")),
        script=TINY,
    )
    job.options = ["--max-failures", "1000"]
    return job


@pytest.mark.parametrize("count", [int(DISTURBANCES)] if DISTURBANCES else COUNTS)
def test_disturbances_leave_no_trace(tmp_path, count):
    dice = random.Random(SEED)
    print(f"seed {SEED}, {count} disturbances")
    with make_job(tmp_path / "calm") as calm:
        assert calm.start().wait(120) == 0
    # Spread over the run, so that the last ones still find it running.
    total = EPOCHS * STEPS_PER_EPOCH
    moments = sorted(dice.randrange(1, total - 10) for _ in range(count))
    kinds = [kind for kind in KINDS for _ in range(-(-count // len(KINDS)))]
    dice.shuffle(kinds)
    with make_job(tmp_path / "wild") as wild:
        wild.start()
        for moment, kind in zip(moments, kinds[:count], strict=True):
            wild.until_training()
            wild.until_step(moment)
            print(f"step {moment}: {kind.__name__}")
            kind(wild, dice)
        code = wild.wait(120)
        assert (code if code not in (75, 76) else wild.finish()) == 0, wild.output()
    expected = used_samples(tmp_path / "calm" / "trace", 2)
    assert len(expected) == 2 * total
    assert used_samples(tmp_path / "wild" / "trace", 2) == expected
    digests = [(tmp_path / name / "digest").read_text() for name in ("calm", "wild")]
    assert digests[0] == digests[1]
    assert not list((tmp_path / "wild" / "job" / ".attempts").iterdir())


def test_every_sample_of_an_epoch_is_used_once(tmp_path):
    with make_job(tmp_path) as job:
        job.arguments += ["--epochs", "1"]
        assert job.start().wait(120) == 0
    samples = [
        index for _, used, _ in used_samples(tmp_path / "trace", 2).values() for index in used
    ]
    # 203 samples on 2 ranks: one is repeated so that both have 102.
    assert sorted(set(samples)) == list(range(203))
    assert len(samples) == 204


# -- the disturbances ---------------------------------------------------------------------------


def term_supervisor(job: Job, dice: random.Random) -> None:
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.output()
    job.start()


def kill_supervisor(job: Job, dice: random.Random) -> None:
    tree = job.tree()
    job.process.send_signal(signal.SIGKILL)
    job.process.wait(10)
    assert not survivors(tree), job.output()
    job.start()


def kill_agent(job: Job, dice: random.Random) -> None:
    expect_recovery(job, job.agent())


def kill_forkserver(job: Job, dice: random.Random) -> None:
    expect_recovery(job, job.forkserver())


def kill_worker(job: Job, dice: random.Random) -> None:
    expect_recovery(job, dice.choice(job.workers()))


def term_agent_and_worker(job: Job, dice: random.Random) -> None:
    """Such signals reach everybody under SLURM, and must change nothing."""
    before = job.view().incarnation
    for process in (job.agent(), *job.workers()):
        for child in process.children():
            if process.pid != job.agent().pid:
                child.send_signal(signal.SIGTERM)  # a DataLoader's child
        process.send_signal(signal.SIGTERM)
    step = job.view().position.step
    job.until_step(step + 3)
    assert job.view().incarnation == before


def expect_recovery(job: Job, victim: psutil.Process) -> None:
    before = job.view().incarnation
    victim.send_signal(signal.SIGKILL)
    job.until(lambda view: view.incarnation > before, "the next incarnation")


KINDS = [
    term_supervisor, kill_supervisor, kill_agent, kill_forkserver, kill_worker,
    term_agent_and_worker,
]  # fmt: skip
