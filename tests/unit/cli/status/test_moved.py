"""A moved or copied job directory: no command is for another directory, and nothing was killed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from elastic_ckpt.cli.save import running_records
from elastic_ckpt.cli.status.view import StatusView, gather
from elastic_ckpt.jobdir.node_record import NodeRecord, ProcessIdentity
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import RunCommand
from elastic_ckpt.protocol.run_state import RunState
from tests.checkpoints import make_checkpoint, open_job

ELSEWHERE = ProcessIdentity("far", "another boot", 4711, 12345.0)


@pytest.fixture
def old(tmp_path: Path) -> JobDirectory:
    """The directory in which the run was."""
    return open_job(tmp_path / "old")


@pytest.fixture
def new(tmp_path: Path) -> JobDirectory:
    """The directory that it was moved or copied to."""
    job = open_job(tmp_path / "new")
    make_checkpoint(job, 60)
    return job


def record(job: JobDirectory, place: JobDirectory, state: RunState, **more: Any) -> None:
    argv = ("elastic-ckpt", "run", "--dir", "old", "train.py", "--dir", "data")
    fields = {"owner": ProcessIdentity.current(), "message": state.value} | more
    NodeRecord(
        job="old", run_id="1", node="here", since=time.time(), state=state,
        command=RunCommand(argv, "/work", options=4, place=str(place.root)), **fields,
    ).write(job.node_record("here"))  # fmt: skip


def rerun(job: JobDirectory) -> str:
    return f"cd /work && elastic-ckpt run --dir {job.root} train.py --dir data"


def look(job: JobDirectory) -> StatusView:
    view = gather(job)
    assert not any("--dir old" in line for line in view.commands)
    return view


@pytest.mark.parametrize(("state", "code"), [(RunState.PREEMPTED, 75), (RunState.FAILED, 70)])
@pytest.mark.parametrize("owner", [ProcessIdentity.current(), ELSEWHERE])
def test_after_a_run_the_command_is_for_the_directory_that_was_asked(
    old: JobDirectory, new: JobDirectory, state: RunState, code: int, owner: ProcessIdentity
) -> None:
    record(new, old, state, exit_code=code, owner=owner)
    view = look(new)
    assert view.advice.startswith(f"this directory was {old.root}, and was moved or copied; ")
    assert "run it with this directory: it resumes from step 60" in view.advice
    assert view.commands[-1] == rerun(new)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (None, "how the run ended is not known here"),
        ({"state": RunState.RUNNING}, "the run continues there"),
        ({"state": RunState.PREEMPTED, "message": "preempted, saved"},
         "the run ended there: preempted, saved"),
    ],
)  # fmt: skip
def test_a_run_that_was_in_it_was_not_killed(
    old: JobDirectory, new: JobDirectory, there: dict[str, Any] | None, said: str
) -> None:
    record(new, old, RunState.RUNNING)
    if there is not None:
        record(old, old, **there)
    view = look(new)
    assert (view.state, view.exit_code, view.workers) == ("dead", 2, [])
    assert view.message == (
        f"this directory was {old.root}, moved or copied while a run was in it: {said}"
    )
    assert view.commands == (f"elastic-ckpt status {old.root}", rerun(new))
    assert running_records(new) == [], "save and drill would wait for nothing"


def test_another_path_to_the_same_directory_is_no_move(old: JobDirectory, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(old.root)
    record(old, JobDirectory(tmp_path / "link"), RunState.PREEMPTED)
    assert gather(old).advice == "rerun the same command: it starts at step 0"


def test_a_finished_job_was_finished_wherever_it_was(old: JobDirectory, new: JobDirectory) -> None:
    record(new, old, RunState.FINISHED, exit_code=0)
    assert look(new).advice == "nothing is left to do; its checkpoints:"


def test_of_another_host_the_mounts_may_differ(old: JobDirectory, new: JobDirectory) -> None:
    record(new, old, RunState.RUNNING, owner=ELSEWHERE)
    assert look(new).state == "running"
