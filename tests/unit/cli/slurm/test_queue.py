"""What is said of a job that SLURM has not started, or that ended: with a fake squeue."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from elastic_ckpt.cli.app import group
from elastic_ckpt.cli.slurm.queue import SlurmView, ask_slurm
from elastic_ckpt.cli.status.view import StatusView
from elastic_ckpt.jobdir.node_record import NodeRecord, ProcessIdentity
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import RunCommand
from elastic_ckpt.jobdir.slurm_jobs import SlurmJob, remember_job
from elastic_ckpt.protocol.run_state import RunState

SUBMIT = "cd / && elastic-ckpt slurm submit /job.toml -- --time=60"
Slurm = Callable[[str, str], None]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Make a SLURM with this queue, and this answer about a job; it does not answer if empty."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def make(queue: str, shown: str) -> None:
        for name, text in (("squeue", queue), ("scontrol", shown)):
            program = tmp_path / name
            said = f"cat <<'END'\n{text}\nEND\n" if text else "exit 1\n"
            program.write_text(f"#!/bin/sh\n{said}")
            program.chmod(0o755)

    make("", "")
    return make


def call(*words: str) -> Result:
    return CliRunner().invoke(group, list(words), standalone_mode=False)


def end(directory: Path, state: RunState, code: int | None = None, job: str = "25") -> None:
    directory.mkdir()
    found = JobDirectory.at(directory)
    found.prepare()
    command = RunCommand(("elastic-ckpt", "run"), "/", slurm_job=job, submit=SUBMIT)
    NodeRecord(
        job="x", run_id="1", node="here", owner=ProcessIdentity.current(), since=time.time(),
        state=state, exit_code=code, message="gone", command=command,
    ).write(found.node_record("here"))  # fmt: skip


def status(*words: str) -> StatusView:
    found = call("status", "--json", *words)
    view = msgspec.json.decode(found.output, type=StatusView)
    assert found.return_value == view.exit_code
    return view


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    ("queue", "shown", "state", "code", "message", "commands"),
    [
        ("25 N/A PENDING Resources", "", "queued", 0,
         "job 25 is queued in SLURM (Resources); it has not started yet", ()),
        ("25 N/A PENDING JobHeldUser", "", "queued", 0,
         "job 25 is queued in SLURM (JobHeldUser); it has not started yet",
         ("scontrol release 25",)),
        ("25 N/A RUNNING None", "", "starting", 0,
         "job 25 is RUNNING in SLURM; its run has not begun", ()),
        ("", "", "unknown", 1, "it was submitted as SLURM job 25 and has not started",
         ("squeue --job 25",)),
        ("1 N/A RUNNING None", "JobId=25 JobState=FAILED Reason=JobLaunchFailure Restarts=0",
         "unknown", 2, "SLURM job 25 ended before its run began (FAILED, JobLaunchFailure)",
         (SUBMIT,)),
        ("1 N/A RUNNING None", "", "unknown", 2,
         "SLURM job 25 ended before its run began (gone)", (SUBMIT,)),
    ],
)  # fmt: skip
def test_a_job_that_has_not_begun(
    slurm: Slurm, tmp_path: Path, exists: bool, queue: str, shown: str, state: str, code: int,
    message: str, commands: tuple[str, ...],
) -> None:  # fmt: skip
    slurm(queue, shown)
    remember_job("25", SlurmJob(tmp_path / "ck", SUBMIT))
    if exists:
        (tmp_path / "ck").mkdir()
    view = status("25")
    assert (view.state, view.message, view.exit_code) == (state, message, code)
    assert view.commands == commands and "elastic-ckpt run" not in view.advice
    assert message in call("status", "25").output
    if exists:
        return
    for words in (["list"], ["logs"], ["logs", "--follow"]):
        found = call(*words, "25")
        if code < 2:
            assert (found.return_value, found.output) == (0, f"elastic-ckpt: {message}\n")
        else:
            assert str(found.exception) == message
    assert str(call("save", "25").exception) == message
    if code < 2:
        assert call("list", "--json", "25").stdout == "[]\n"


def test_an_array_names_its_tasks(slurm: Slurm, tmp_path: Path) -> None:
    slurm("17 3 PENDING Priority", "")
    remember_job("17", SlurmJob(tmp_path / "ck", SUBMIT, "1-8%2"))
    message = "job 17_3 is queued in SLURM (Priority); it has not started yet"
    assert status("17_3").message == message
    assert "name a task, 17_1, 17_2 ... 17_8" in str(call("status", "17").exception)


REQUEUED = "SLURM has requeued job 25 (PENDING, BeginTime), nothing is to be typed: it starts at"
AGAIN = "submit it again: it starts at step 0"


@pytest.mark.parametrize(
    ("state", "queue", "code", "text", "commands"),
    [
        (RunState.PREEMPTED, "25 N/A PENDING BeginTime", 1, REQUEUED, ()),
        (RunState.PREEMPTED, "30 N/A PENDING Priority", 1,
         "SLURM has queued job 30 (PENDING, Priority), nothing is to be typed", ()),
        (RunState.PREEMPTED, "30 N/A PENDING JobHeldUser", 1, "job 30 is held in SLURM; to let",
         ("scontrol release 30",)),
        (RunState.PREEMPTED, "25 N/A COMPLETING None", 1, "job 25 is COMPLETING in SLURM", ()),
        (RunState.PREEMPTED, "9 N/A RUNNING None", 1, AGAIN, (SUBMIT,)),
        (RunState.PREEMPTED, "", 1, f"if SLURM, which does not answer here, has not requeued it, "
         f"{AGAIN}", (SUBMIT,)),
        (RunState.FAILED, "9 N/A RUNNING None", 2, "see why it failed (elastic-ckpt logs "
         f"--processes --last), fix that, then {AGAIN}", ("logs", SUBMIT)),
        (RunState.FAILED, "30 N/A PENDING Priority", 1, "SLURM has queued job 30", ()),
        (RunState.FINISHED, "9 N/A RUNNING None", 0, "nothing is left to do", ()),
    ],
)  # fmt: skip
def test_a_submitted_job_that_ended(
    slurm: Slurm, tmp_path: Path, state: RunState, queue: str, code: int, text: str,
    commands: tuple[str, ...],
) -> None:  # fmt: skip
    slurm(queue, "")
    for number in ("25", "30"):
        remember_job(number, SlurmJob(tmp_path / "ck", SUBMIT))
    end(tmp_path / "ck", state)
    for view in (status(str(tmp_path / "ck")), status("25")):
        assert view.advice.startswith(text) and view.exit_code == code
        shown = tuple(SUBMIT if one == SUBMIT else one.split()[1] for one in view.commands)
        assert shown == commands or view.commands == commands


def test_a_job_outside_slurm_asks_nobody(slurm: Slurm, tmp_path: Path) -> None:
    assert ask_slurm(tmp_path, "") is None  # nothing is recorded
    remember_job("25", SlurmJob(tmp_path / "other", SUBMIT))
    slurm("25 N/A PENDING Resources", "")
    assert ask_slurm(tmp_path, "") is None
    assert ask_slurm(tmp_path / "other", "") == SlurmView("25", "PENDING", "Resources", SUBMIT)
