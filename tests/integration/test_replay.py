"""A part of a job is trained again and compared: equal, or where it first differs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.audit_events import StateDigest
from elastic_ckpt.journal.journal import read_journal
from tests.job import SCRIPTS, Job, environment


def status(job: Job) -> str:
    asked = [sys.executable, "-m", "elastic_ckpt", "status", "-v", str(job.directory)]
    done = subprocess.run(asked, env=environment(), capture_output=True, text=True, timeout=60)
    return done.stdout


def replay(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", "replay", *map(str, arguments)],
        env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture
def job(tmp_path: Path):
    arguments = ("--trace", str(tmp_path / "trace"), "--epochs", "1", "--pause", "0.03")
    made = Job(tmp_path, *arguments, nproc=2, script=SCRIPTS / "steady.py")
    made.options = ["--save-interval", "20", "--digests", "10"]
    with made:
        yield made


def test_a_job_with_a_crash_and_a_notice_is_equal_to_the_bit(job: Job, tmp_path: Path) -> None:
    job.start().until(lambda view: view.workers and view.workers[0].step > 45, "step 45")
    job.workers()[1].send_signal(signal.SIGKILL)
    job.until(lambda view: view.incarnation == 2 and view.workers[0].step > 65, "step 65")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.output()
    assert job.start().wait() == 0, job.output()

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = replay(job.directory / "epoch-0_step-20", "--scratch", scratch, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["first"], found["last"], found["ranks"]) == (20, 120, 2)
    assert (found["digests"], found["different"], found["bounds"]) == (20, None, "")
    assert list(scratch.iterdir()) == []
    view = job.view()
    assert (view.last_audit.last, view.last_audit.different) == (120, "")
    assert "equal to the bit" in status(job)


@pytest.mark.one_torch
def test_a_script_that_was_changed_differs_and_the_tensor_is_named(
    job: Job, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    text = (SCRIPTS / "steady.py").read_text()
    script.write_text(text)
    job.script = script
    assert job.start().wait() == 0, job.output()
    before = [one.event for one in read_journal(JobDirectory.at(job.directory))]
    assert sum(isinstance(one, StateDigest) for one in before) == 24

    place = "                if session.step_ends:\n"
    assert text.count(place) == 1
    wrong = "                if rank == 1 and session.step == 69:\n"
    wrong += "                    next(model.parameters()).grad.view(-1)[0] *= 1.001\n"
    script.write_text(text.replace(place, wrong + place))
    done = replay(job.directory / "epoch-0_step-40")
    assert done.returncode == 1, done.stdout + done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("different at step 70, rank 1: module.0.weight and "), first
    assert second.startswith("compared steps 41 to ")
    assert "DIFFERENT at step 70, rank 1" in status(job)


@pytest.mark.one_torch
def test_what_cannot_be_replayed_is_one_line(job: Job, tmp_path: Path) -> None:
    job.options = ["--save-interval", "50"]
    assert job.start().wait() == 0, job.output()
    for arguments, code, said in (
        (job.directory / "epoch-0_step-50", 64, "has no digests after step 50"),
        (job.directory, 64, "is not a checkpoint: pass one that elastic-ckpt list"),
        (job.directory / "epoch-0_step-51", 65, "epoch-0_step-51"),
    ):
        done = replay(arguments)
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(Path(tempfile.gettempdir()).glob("elastic-ckpt-replay-*"))


@pytest.mark.slow
def test_a_script_that_ends_early_is_said(job: Job, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text((SCRIPTS / "steady.py").read_text())
    job.script = script
    assert job.start().wait() == 0, job.output()
    script.write_text("raise SystemExit('no data set')\n")
    done = replay(job.directory / "epoch-0_step-40")
    assert done.returncode == 70
    assert "the training of the replay ended before step 120" in done.stderr
    assert "no data set" in done.stderr
