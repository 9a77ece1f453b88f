"""Lightning's Trainer under a supervisor, and without one: to the bit as undisturbed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integrations.example import EXAMPLES, Example
from tests.job import environment
from tests.marks import slow
from tests.ports import free_port

pytest.importorskip("lightning")

BATCHES = {1: 135, 2: 69}
EPOCHS = 3


class Fit(Example):
    """A run of the example."""

    script = EXAMPLES / "lightning_fit.py"


@pytest.fixture(scope="module", params=[slow(1), 2], ids=["1 process", "2 processes"])
def undisturbed(request, tmp_path_factory) -> Fit:
    with Fit(tmp_path_factory.mktemp("undisturbed"), request.param) as job:
        assert job.start().wait() == 0, job.output()
    assert len(job.samples(0)) == BATCHES[job.nproc]
    assert len(job.weights()) == 1
    return job


def test_a_notice_repeats_and_loses_no_sample(undisturbed: Fit, tmp_path: Path) -> None:
    """Stopped in the first epoch, and in the last one; each rank reads every batch once."""
    with Fit(tmp_path, undisturbed.nproc, "--pause", "0.03", "--every", "1000") as job:
        job.stop_twice(undisturbed, 11, BATCHES[job.nproc] - 9)


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


@pytest.mark.slow
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
            [*command, str(Fit.script), "--trace", str(directory / "trace"), *arguments],
            stdout=log, stderr=log,
            env=environment() | {"ELASTIC_CKPT_DIR": str(directory / "job")},
        )  # fmt: skip
