"""SIGKILL to a worker: the stages of the recovery are in the journal and in ``status``."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.job import Job, environment


def recoveries(job):
    return [event["data"] for event in job.events() if event["event"] == "recovery"]


@pytest.mark.one_torch
def test_recovery_stages_add_up(tmp_path):
    with Job(
        tmp_path, "--epochs", "1000", "--interval", "2", "--workers", "0", "--pause", "0.01"
    ) as job:
        job.start().until_step(5)
        (victim,) = [w.pid for w in job.view().workers if w.rank == 1]
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        job.until(lambda view: view.last_recovery is not None, "a recovery")
        seen = time.monotonic()
        (found,) = recoveries(job)
        stages = found["stages"]
        assert found["total"] == pytest.approx(sum(stages.values()))
        assert 0 < found["total"] < seen - killed
        assert all(seconds >= 0 for seconds in stages.values())
        # every other stage takes time on any machine
        happened = {name for name, seconds in stages.items() if seconds > 0}
        assert happened >= set(stages) - {"detect", "stop"}
        assert found["incarnation"] == 2
        assert found["tier"] in ("memory", "disk")  # disk, if no generation was free
        assert found["step"] >= 4
        printed = subprocess.run(
            [sys.executable, "-m", "elastic_ckpt", "status", "-v", str(job.directory)],
            capture_output=True, text=True, env=environment() | {"COLUMNS": "200"}, timeout=60,
        ).stdout  # fmt: skip
        line = next(line for line in printed.splitlines() if line.startswith("last recovery"))
        assert f"from step {found['step']} ({found['tier']})" in line
        assert "first step" in line and "rendezvous" in line
