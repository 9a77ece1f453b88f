"""A run whose output nothing reads: a paused less, Ctrl-S, a stopped tee."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.job import Job, environment

pytestmark = pytest.mark.one_torch

CHATTY = """
import time

import torch
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Session

data = TensorDataset(torch.ones(4000, 1))
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with Session(model=model, optimizer=optimizer) as session:
    for _ in session.epochs(10):
        for (batch,) in session.batches(DataLoader(data, sampler=ElasticSampler(data))):
            model(batch).mean().backward()
            optimizer.step()
            print(f"step {session.step} " + "x" * 20000)
            time.sleep(0.01)
"""


def test_job_trains_and_saves_in_time_while_nothing_reads_its_output(tmp_path: Path) -> None:
    script = tmp_path / "chatty.py"
    script.write_text(CHATTY)
    reading, writing = os.pipe()
    with Job(tmp_path, nproc=1, script=script) as job:
        job.process = subprocess.Popen(
            [sys.executable, "-m", "elastic_ckpt", "run", "--dir", str(job.directory),
             "--nproc", "1", "--grace", "20", "--", str(script)],
            stdout=writing, stderr=writing, env=environment(),
        )  # fmt: skip
        job.until_step(150)  # 3 MB
        tree = job.tree()
        began = time.monotonic()
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(40) == 75
        assert time.monotonic() - began < 20.0
        assert not [one for one in tree if one.is_running() and one.status() != "zombie"]
        newest = job.view().newest_intact
        assert newest.reason == "emergency"
        log = job.directory / ".elastic-ckpt" / "logs" / "000001" / "00000.log"
        steps = [int(line.split()[1]) for line in log.read_text().splitlines() if "step " in line]
        assert steps == list(range(steps[0], steps[0] + len(steps))) and len(steps) >= 150
        assert steps[-1] >= newest.step - 1
    os.close(writing)
    os.close(reading)
