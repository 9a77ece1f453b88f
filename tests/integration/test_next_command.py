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
from tests.checkpoints import MODEL, make_checkpoint
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
        shown = f"next: see what it does:\n  elastic-ckpt status {job.directory}\n"
        assert second.stderr.endswith(shown)


FINISHES = "print(1)"
FAILS = "raise SystemExit(3)"
LOADS = """
import torch
from elastic_ckpt import Session
model = torch.nn.Linear(1, 1)
with Session(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)):
    print("loaded")
"""
WAITS = "import time\nprint('waits', flush=True)\ntime.sleep(60)"

ENDINGS = [
    # code, script, options, what the last line ends with
    (0, FINISHES, (), "elastic-ckpt status {job}"),
    (64, FINISHES, ("--nproc", "two"), "elastic-ckpt run --help"),
    (64, FINISHES, ("--nprocs", "2"), "elastic-ckpt run --help"),
    (64, FINISHES, ("--config", "absent.toml"), "elastic-ckpt run --help"),
    (65, LOADS, (), "elastic-ckpt list {job}"),
    (70, FAILS, (), "run --dir {job} train.py"),
    (73, "", (), "run --dir {job} train.py"),
    (76, WAITS, (), "run --dir {job} train.py"),
]


@pytest.mark.parametrize(("code", "script", "options", "last"), ENDINGS)
def test_every_ending_has_the_next_command_as_its_last_line(
    tmp_path: Path, code: int, script: str, options: tuple[str, ...], last: str
) -> None:
    """75 is above, in full."""
    job = tmp_path / "job"
    (tmp_path / "train.py").write_text(script)
    if not script:
        job.touch()
    elif script == LOADS:
        made = JobDirectory(job)
        made.prepare()
        make_checkpoint(made, 60)
        (made.checkpoint(0, 60) / MODEL).unlink()
    run = [sys.executable, "-m", "elastic_ckpt", "run", *options, "--dir", str(job), "train.py"]
    process = subprocess.Popen(
        run, cwd=tmp_path, env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        if script == WAITS:
            assert process.stdout is not None and "waits" in process.stdout.readline()
            process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == code, said
    line = said.splitlines()[-1]
    assert line.startswith("  ") and line.endswith(last.format(job=job)), said
    assert said.count("elastic-ckpt: next: ") == 1
