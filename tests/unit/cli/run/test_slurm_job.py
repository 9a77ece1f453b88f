"""What a run of a SLURM job says of other jobs, and of itself."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.cli.run import ending
from elastic_ckpt.cli.run.command import _of_node, _remember_slurm_job, _slurm_holder
from elastic_ckpt.errors import DirectoryUnusable, LockHeld, UsageError, next_steps
from elastic_ckpt.jobdir.node_record import NodeRecord, ProcessIdentity
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import RunCommand
from elastic_ckpt.jobdir.slurm_jobs import SlurmJob, find_job, remember_job
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.util.journald import priority_of, warning

SUBMIT = "cd / && elastic-ckpt slurm submit job.toml"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "ck").mkdir()
    return SimpleNamespace(
        directory=tmp_path / "ck", notice_sources=("slurm",), node="n2", nodes=(1, 2)
    )


@pytest.mark.parametrize(
    ("job", "state", "is_named"),
    [("4", RunState.RUNNING, True), ("3", RunState.RUNNING, False), ("", RunState.RUNNING, False),
     ("4", RunState.PREEMPTED, False)],
)  # fmt: skip
def test_the_job_that_holds_the_directory_is_named(
    settings: Any, job: str, state: RunState, is_named: bool
) -> None:
    found = JobDirectory.at(settings.directory)
    found.prepare()
    NodeRecord(
        job="x", run_id="1", node="here", owner=ProcessIdentity.current(), since=time.time(),
        state=state, command=RunCommand((), "/", slurm_job=job),
    ).write(found.node_record("here"))  # fmt: skip
    said = _slurm_holder(settings)
    assert bool(said) is is_named
    if is_named:
        assert said.startswith("SLURM job 4 runs in") and "scancel 4" in said
        assert "--dir" not in said and "pid" not in said


def test_a_record_of_the_submission_is_kept(
    settings: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submitted = SlurmJob(settings.directory, SUBMIT)
    remember_job("3", submitted)
    _remember_slurm_job(settings)
    assert find_job("3") == submitted and RunCommand.current(()).rerun() == SUBMIT
    settings.directory = tmp_path / "other"  # a number that was used before
    _remember_slurm_job(settings)
    assert find_job("3") == SlurmJob(tmp_path / "other")
    remember_job("17", SlurmJob(tmp_path, SUBMIT, "1-2"))
    for raw in ("18", "17"):  # the last task has the array's own number
        monkeypatch.setenv("SLURM_JOB_ID", raw)
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
        settings.directory = tmp_path / "task-1"
        _remember_slurm_job(settings)
        assert (
            find_job("18")
            == find_job("17_1")
            == SlurmJob(tmp_path / "task-1", f"{SUBMIT} --array=1")
        )
    assert find_job("17") == SlurmJob(tmp_path, SUBMIT, "1-2")


def test_lines_of_several_nodes_name_theirs(settings: Any) -> None:
    line = _of_node(warning("slow"), settings)
    assert (line, priority_of(line)) == ("n2: slow", priority_of(warning("")))
    settings.nodes = (1, 1)
    assert _of_node("slow", settings) == "slow"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UsageError("x"), "correct the job file, then submit it again:"),
        (DirectoryUnusable("x"), "see what is wrong with it, then submit it again:"),
        (LockHeld("x"), "see what it does:"),
    ],
)
def test_an_error_of_a_submitted_job_advises_to_submit(
    monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    monkeypatch.setattr(ending, "submission", lambda: SUBMIT)
    with pytest.raises(type(error)) as caught, ending.advised("/ck", lambda: "elastic-ckpt run"):
        raise error
    lines = next_steps(caught.value)
    assert lines[0] == f"elastic-ckpt: next: {text}" and "elastic-ckpt run" not in lines[-1]
    assert isinstance(error, LockHeld) or lines[-1] == f"  {SUBMIT}"
