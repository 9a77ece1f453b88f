"""What to do next about a job that has ended: right for each ending, with the command to type."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from elastic_ckpt.checkpoint.own.files import stamps_of
from elastic_ckpt.checkpoint.own.seal import seal, write
from elastic_ckpt.cli.status.advice import advise_member
from elastic_ckpt.cli.status.page import make_console, show
from elastic_ckpt.cli.status.view import StatusView, gather
from elastic_ckpt.jobdir.node_record import NodeRecord, ProcessIdentity
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import RunCommand
from elastic_ckpt.journal.line import encode_line
from elastic_ckpt.protocol.run_state import RunState
from tests.checkpoints import MODEL, make_checkpoint
from tests.journals import happened

ARGV = ("elastic-ckpt", "run", "--dir", "ck", "train.py", "--name", "a b")
RERUN = "cd '/my work' && elastic-ckpt run --dir ck train.py --name 'a b'"
BOTH_BAD = "2 checkpoints in a row failed verification and were moved away"


def ended(state: RunState, code: int | None = None, **more: Any) -> NodeRecord:
    more = {"command": RunCommand(ARGV, "/my work"), "message": state.value} | more
    return NodeRecord(
        job="tested", run_id="1", node="here", owner=ProcessIdentity.current(),
        since=time.time(), state=state, exit_code=code, **more,
    )  # fmt: skip


def look(job: JobDirectory, state: RunState, code: int | None = None, **more: Any) -> StatusView:
    ended(state, code, **more).write(job.node_record("here"))
    return gather(job)


def fail_save(job: JobDirectory, name: str = "save_failed") -> None:
    """Let the newest save fail for want of room."""
    error = {"step": 80, "error": "No space left on device"}
    event = happened(time.time(), name, error, monotonic=time.monotonic(), node="here")
    job.journal("here").write_bytes(encode_line(event) + b"\n")


@pytest.mark.parametrize(
    ("state", "code", "message", "text", "commands"),
    [
        (RunState.FINISHED, 0, "", "nothing is left to do; its checkpoints:", ["list"]),
        (RunState.PREEMPTED, 75, "", "rerun the same command: it resumes from step 60", [RERUN]),
        (RunState.PREEMPTED, 76, "", "rerun the same command: it resumes from step 60", [RERUN]),
        (RunState.FAILED, 70, "", "see why it failed (elastic-ckpt logs --processes --last), fix "
         "that, then rerun the same command: it resumes", ["logs --processes --last", RERUN]),
        (RunState.FAILED, 65, "the data set is another one", "correct what the message says does "
         "not match, then rerun the same command: it resumes from step 60", [RERUN]),
        (RunState.FAILED, 64, "none has x; they were left where they are: give", "correct "
         "--complete-when in this command:", [RERUN]),
        (RunState.FAILED, 65, BOTH_BAD, "fix the storage (elastic-ckpt list), then rerun",
         ["list", RERUN]),
    ],
)  # fmt: skip
def test_each_ending_says_what_to_type(
    job: JobDirectory, state: RunState, code: int, message: str, text: str, commands: list[str]
) -> None:
    make_checkpoint(job, 60)
    view = look(job, state, code, message=message)
    assert view.advice.startswith(text)
    own = [RERUN if one == RERUN else f"elastic-ckpt {one} {job.root}" for one in commands]
    assert list(view.commands) == own


@pytest.mark.parametrize("state", [RunState.PREEMPTED, RunState.FAILED])
def test_where_no_checkpoint_is_intact_a_rerun_is_not_advised(
    job: JobDirectory, state: RunState
) -> None:
    make_checkpoint(job, 60)
    (job.checkpoint(0, 60) / MODEL).unlink()
    view = look(job, state, 65)
    assert "a rerun would end the same way" in view.advice
    assert "step 0" not in view.advice
    assert list(view.commands) == [f"elastic-ckpt list {job.root}"]


@pytest.mark.parametrize(
    ("state", "code"), [(RunState.PREEMPTED, 76), (RunState.FAILED, 70), (RunState.RUNNING, None)]
)
@pytest.mark.parametrize("event", ["save_failed", "drain_failed"])
def test_a_job_whose_saves_fail_is_not_simply_run_again(
    job: JobDirectory, state: RunState, code: int | None, event: str
) -> None:
    """It would lose the same work again."""
    make_checkpoint(job, 60)
    fail_save(job)
    gone = ProcessIdentity("here", ProcessIdentity.current().boot_id, 1, 12345.0)
    more = {"owner": gone} if state is RunState.RUNNING else {}
    record = ended(state, code)
    for name, value in more.items():
        setattr(record, name, value)
    record.write(job.node_record("here"))
    view = gather(job)
    assert view.state == ("dead" if more else state.value)
    assert view.advice.startswith("first make saves work, or the same steps are lost again")
    assert "No space left on device; then rerun the same command" in view.advice
    assert list(view.commands) == [f"elastic-ckpt doctor {job.root}", RERUN]


def test_an_empty_job_starts_again_at_step_0(job: JobDirectory) -> None:
    assert look(job, RunState.PREEMPTED, 76).advice == "rerun the same command: it starts at step 0"
    assert look(job, RunState.FINISHED, 0).advice == "nothing is left to do"


def test_a_job_of_slurm_or_systemd_may_come_back_by_itself(job: JobDirectory) -> None:
    for name in ("SLURM_JOB_ID", "INVOCATION_ID"):
        view = look(job, RunState.PREEMPTED, 75, command=RunCommand(ARGV, "/", ("HOME", name)))
        assert "rerun the same command, unless systemd or SLURM does: it" in view.advice


@pytest.mark.parametrize(
    ("options", "is_known"),
    [
        (("--watch", "out-*"), False),
        (("--watch=out-*",), False),
        (("--watch", "out-*", "--resume-args", "--resume {newest}"), True),
        ((), True),  # announced by an integration
    ],
)
def test_a_script_that_gets_no_arguments_must_find_its_checkpoint_itself(
    job: JobDirectory, tmp_path: Path, options: tuple[str, ...], is_known: bool
) -> None:
    saved = tmp_path / "out-20"
    saved.mkdir()
    (saved / "model").write_bytes(b"1")
    write(job, seal(saved, stamps_of(saved), number=1, step=20, run=1, incarnation=1))
    command = RunCommand((*ARGV[:4], *options, "train.py"), "/my work")
    advice = look(job, RunState.PREEMPTED, 76, command=command).advice
    assert advice.startswith("rerun the same command: it resumes from out-20")
    assert advice.endswith("else give --resume-args") is not is_known


def test_an_unknown_command_is_not_invented(job: JobDirectory) -> None:
    for command in (None, RunCommand((), "/")):
        view = look(job, RunState.PREEMPTED, 75, command=command)
        assert view.commands == () and "rerun the same command" in view.advice


def test_several_nodes_are_all_started_again(job: JobDirectory) -> None:
    view = look(job, RunState.PREEMPTED, 75, present=("here", "there"))
    assert "rerun the same command on each node: it" in view.advice


def test_a_job_that_runs_needs_no_command(job: JobDirectory) -> None:
    view = look(job, RunState.RUNNING)
    assert (view.advice, view.commands) == ("", ())


def test_a_node_that_left_can_join_again() -> None:
    text, commands = advise_member(ended(RunState.PREEMPTED, 75, head="n0"), 2)
    assert text.startswith("the others continue if at least 2 are left;")
    assert "to add this node, rerun the same command" in text
    assert commands == (RERUN,)
    assert advise_member(ended(RunState.FINISHED, 0, head="n0"), 2) == ("nothing is left to do", ())


@pytest.mark.parametrize("columns", ["40", "200"])
def test_page_shows_a_long_command_in_one_line(
    job: JobDirectory, columns: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    words = tuple(f"--option-{number}" for number in range(40))
    command = RunCommand((*ARGV, *words), "/my work")
    view = look(job, RunState.PREEMPTED, 75, command=command)
    show(view, make_console())
    assert f"  {command.line()}" in capsys.readouterr().out.splitlines()
