"""The command that a run prints at its end is the one that continues the job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_ckpt.jobdir.node_record import job_records
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.job import Job, environment

pytestmark = pytest.mark.one_torch


def command_of(output: str) -> str:
    """Return the last command after the last ``next:`` of a run."""
    shown = output.rpartition("elastic-ckpt: next: ")[2].splitlines()
    return [line[2:] for line in shown[1:] if line.startswith("  ")][-1]


def test_a_preempted_job_is_continued_by_the_command_that_it_prints(tmp_path: Path) -> None:
    place = tmp_path / "it's a place"
    arguments = ["--epochs", "2", "--pause", "0.02"]
    with Job(place, *arguments, nproc=1) as job:
        job.options = ["--name", "my job"]
        job.start().until_step(3)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(60) == 75, job.output()
        output = job.output()
        assert "elastic-ckpt: next: rerun the same command" in output
        step = job.view().newest_intact.step
        assert f"it resumes from step {step}" in output
        line = command_of(output)
        assert list(job.view().commands) == [line]

        record = job_records(JobDirectory(job.directory))[0]
        assert record.command is not None and "PATH" in record.command.environment
        assert os.environ["PATH"] not in json.dumps(record.command.environment)

        done = subprocess.run(
            ["bash", "-c", line], cwd="/", env=environment(), capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"incarnation 2, from step {step}" in done.stderr
        assert "next: nothing is left to do; its checkpoints:" in done.stderr
        assert command_of(done.stderr).startswith("elastic-ckpt list ")


def test_a_locked_job_says_how_to_look_at_it(tmp_path: Path) -> None:
    with Job(tmp_path, "--epochs", "50", "--pause", "0.05", nproc=1) as job:
        job.start().until_step(1)
        second = subprocess.run(
            [sys.executable, "-m", "elastic_ckpt", "run", "--dir", str(job.directory),
             "--nproc", "1", str(job.script)],
            env=environment(), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert second.returncode == 73
        assert f"see what it does: elastic-ckpt status {job.directory}\n" in second.stderr
