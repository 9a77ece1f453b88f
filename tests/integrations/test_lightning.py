"""Lightning's Trainer under a supervisor, and without one: to the bit as undisturbed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.ranks import free_port
from tests.job import Job, environment

pytest.importorskip("lightning")

FIT = Path(__file__).parents[2] / "examples" / "lightning_fit.py"
BATCHES = {1: 135, 2: 69}
EPOCHS = 3


class Fit(Job):
    """A run of the example, with the samples that each of its ranks saw."""

    def __init__(self, directory: Path, nproc: int, *arguments: str) -> None:
        super().__init__(
            directory, "--trace", str(directory / "trace"), *arguments, nproc=nproc, script=FIT
        )

    def samples(self, rank: int) -> list[list]:
        path = self.root / f"trace.{rank}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until_batches(self, count: int) -> None:
        limit = time.monotonic() + 90
        while len(self.samples(self.nproc - 1)) < count:
            assert time.monotonic() < limit, self.output()
            assert self.process.poll() is None, self.output()
            time.sleep(0.02)

    def weights(self) -> set[str]:
        return set(re.findall(r"weights (\w+)", self.log.read_text()))


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def undisturbed(request, tmp_path_factory) -> Fit:
    with Fit(tmp_path_factory.mktemp("undisturbed"), request.param) as job:
        assert job.start().wait() == 0, job.output()
    assert len(job.samples(0)) == BATCHES[job.nproc]
    assert len(job.weights()) == 1
    return job


def test_a_notice_repeats_and_loses_no_sample(undisturbed: Fit, tmp_path: Path) -> None:
    """Stopped in the first epoch, and in the last one; each rank reads every batch once."""
    with Fit(tmp_path, undisturbed.nproc, "--pause", "0.03", "--every", "1000") as job:
        for count in (11, BATCHES[job.nproc] - 9):
            job.start().until_batches(count)
            job.process.send_signal(signal.SIGTERM)
            assert job.wait() == 75, job.output()
        assert job.start().wait() == 0, job.output()
        for rank in range(job.nproc):
            assert job.samples(rank) == undisturbed.samples(rank)
        assert job.weights() == undisturbed.weights()


def test_a_killed_rank_is_made_good_for_by_the_last_save(undisturbed: Fit, tmp_path: Path) -> None:
    """What is read again is what was read before."""
    with Fit(tmp_path, undisturbed.nproc, "--pause", "0.03", "--every", "3") as job:
        job.start()
        for count in (30, BATCHES[job.nproc] - 9):
            job.until_batches(count)
            job.workers()[-1].send_signal(signal.SIGKILL)
            job.until(lambda view, n=count: view.restarts.failures > (n > 30), "a restart")
        assert job.wait() == 0, job.output()
        for rank in range(job.nproc):
            seen = job.samples(rank)
            assert len(seen) > BATCHES[job.nproc]
            assert all(one in undisturbed.samples(rank) for one in seen)
            assert seen[-1] == undisturbed.samples(rank)[-1]
        assert job.weights() == undisturbed.weights()


@pytest.mark.parametrize("ranks", [1, 2])
def test_without_a_supervisor(ranks: int, tmp_path: Path) -> None:
    """Under plain torchrun, or alone: SIGTERM is the notice, 75 the exit code."""
    whole = run_alone(tmp_path / "whole", ranks, "--pause", "0")
    assert whole.wait(90) == 0, (tmp_path / "whole" / "log").read_text()
    stopped = run_alone(tmp_path / "stopped", ranks, "--pause", "0.03", "--every", "1000")
    limit = time.monotonic() + 90
    trace = tmp_path / "stopped" / f"trace.{ranks - 1}"
    while not trace.exists() or len(trace.read_text().splitlines()) < 11:
        assert time.monotonic() < limit and stopped.poll() is None
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    stopped.wait(90)
    log = (tmp_path / "stopped" / "log").read_text()
    assert stopped.returncode == 75 or "exitcode  : 75" in log or ranks > 1, log
    assert run_alone(tmp_path / "stopped", ranks, "--pause", "0").wait(90) == 0
    for rank in range(ranks):
        name = f"trace.{rank}"
        assert (tmp_path / "stopped" / name).read_text() == (tmp_path / "whole" / name).read_text()


def run_alone(directory: Path, ranks: int, *arguments: str) -> subprocess.Popen:
    directory.mkdir(exist_ok=True)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port")
    command = [sys.executable, *((*torchrun, str(free_port())) if ranks > 1 else ())]
    with open(directory / "log", "ab") as log:
        return subprocess.Popen(
            [*command, str(FIT), "--trace", str(directory / "trace"), *arguments],
            stdout=log, stderr=log,
            env=environment() | {"ELASTIC_CKPT_DIR": str(directory / "job")},
        )  # fmt: skip
