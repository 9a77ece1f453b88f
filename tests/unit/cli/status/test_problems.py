"""What is wrong comes first in ``status``, with the command for it; a healthy job takes six lines.

A table of endings and situations, each as it is on the disk, and what the page must say of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
from rich.console import Console

from elastic_ckpt.checkpoint.catalog import scan
from elastic_ckpt.checkpoint.quarantine import set_aside
from elastic_ckpt.cli.status import disk
from elastic_ckpt.cli.status import view as status_view
from elastic_ckpt.cli.status.page import page
from elastic_ckpt.cli.status.view import NewestView, gather
from elastic_ckpt.cli.status.workers import worker_views
from elastic_ckpt.jobdir.left_out import LeftOutNode, write_left_out
from elastic_ckpt.jobdir.node_record import (
    FailureRecord,
    NodeRecord,
    OwnTrouble,
    ProcessIdentity,
)
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.retention_file import note_rule
from elastic_ckpt.jobdir.run_command import RunCommand
from elastic_ckpt.jobdir.worker_logs import LogWriter
from elastic_ckpt.journal.line import encode_line
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.protocol.slot import Phase
from tests.checkpoints import MODEL, make_checkpoint
from tests.journals import happened

pytestmark = pytest.mark.one_torch

RERUN = "cd /work && elastic-ckpt run --dir ck train.py"
ELSEWHERE = ProcessIdentity("far", "another boot", 4711, 12345.0)
FULL = "rank 0 could not save: [Errno 28] No space left on device"


def gone() -> ProcessIdentity:
    """Return a process of this boot that is not there."""
    return ProcessIdentity("here", ProcessIdentity.current().boot_id, 1, 12345.0)


def failure(rank: int, kind: str, message: str, *tail: str) -> FailureRecord:
    return FailureRecord(rank, kind, message, tail, time.time() - 60)


def two_ranks() -> Board:
    """Return a board of two ranks that train at step 100, with a step in a second."""
    board = Board.create(2)
    board.begin_incarnation(1)
    for rank in (0, 1):
        slot = board.rank_slot(rank)
        slot.launched(rank, os.getpid())
        slot.attach(20)
        slot.first_entry()
        slot.phase(Phase.TRAINING)
        slot.step(101, 100, 0, 800)
        slot.goal(400, 8)
        slot.pace(500_000_000, 1_000_000_000)
    return board


@dataclass(frozen=True)
class Case:
    """A job as it stands on the disk, and what ``status`` must say of it.

    Attributes:
        steps: of its checkpoints; a negative one is damaged.
        journal: event and fields, each a second later.
        wrong: beginning of each ``!`` line, in order.
        advice: a part of the ``→`` line; empty for none.
        commands: all of them in order; ``{job}`` is the directory, RERUN the recorded command.
    """

    name: str
    state: RunState | None = RunState.RUNNING
    code: int | None = None
    message: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = (60,)
    journal: tuple[tuple[str, dict[str, Any]], ...] = ()
    wrong: tuple[str, ...] = ()
    advice: str = ""
    commands: tuple[str, ...] = ()
    prepare: Callable[[JobDirectory], None] = lambda job: None
    exit_code: int = 0


def left_out(job: JobDirectory) -> None:
    write_left_out(job, LeftOutNode("n2", "its check failed: disk", time.time()))


def aside(job: JobDirectory) -> None:
    """Set step 60 aside, so that the one before is the newest."""
    set_aside(job, job.checkpoint(0, 60), f"{MODEL} is damaged")


def printed(job: JobDirectory) -> None:
    """Let ranks 0 and 1 have printed something."""
    for rank in (0, 1):
        LogWriter(job, 1, rank).write(f"rank {rank}: downloading\n".encode())


SAVE_FAILED = ("save_failed", {"step": 80, "error": FULL})
SAVED = ("saved", {"step": 60, "epoch": 0, "tier": "disk", "reason": "interval", "seconds": 0.1})
PREEMPTED, FAILED, FINISHED = RunState.PREEMPTED, RunState.FAILED, RunState.FINISHED
FROM_60 = "rerun the same command: it resumes from step 60"

MISPLACED = ("elastic-ckpt", "run", "--dir", "ck", "t.py", "--keep-last", "3", "--x")
LONG_AGO = time.time() - 30 * 86400  # the same duration for as long as the tests run
NOTHING = {"own_trouble": OwnTrouble("--watch a*: nothing is there", LONG_AGO, False)}
NO_MARK = {"own_trouble": OwnTrouble("2 are there, none complete", LONG_AGO, True)}
HELP = "elastic-ckpt run --help"

ENDINGS = [
    Case("finished", FINISHED, 0, advice="nothing is left to do; its checkpoints:",
         commands=("elastic-ckpt list {job}",)),
    Case("finished, after a checkpoint was set aside", FINISHED, 0, steps=(40, 60), prepare=aside,
         advice="nothing is left to do", commands=("elastic-ckpt list {job}",)),
    Case("preempted, saved", PREEMPTED, 75, "preempted, saved", advice=FROM_60, commands=(RERUN,),
         exit_code=1),
    Case("preempted without a new checkpoint", PREEMPTED, 76, advice=FROM_60, commands=(RERUN,),
         exit_code=1),
    Case("preempted without any checkpoint", PREEMPTED, 76, steps=(), exit_code=1,
         advice="rerun the same command: it starts at step 0", commands=(RERUN,)),
    Case("preempted while the disk was full", PREEMPTED, 76, journal=(SAVE_FAILED,), exit_code=1,
         advice="first make saves work, or the same steps are lost again: the last save failed: "
         f"{FULL}; then {FROM_60}", commands=("elastic-ckpt doctor {job}", RERUN)),
    Case("preempted while the disk was full of checkpoints", PREEMPTED, 76, exit_code=1,
         journal=(SAVE_FAILED,), steps=(20, 40, 60), advice="first make saves work",
         commands=("elastic-ckpt prune {job} --keep-last 2", RERUN)),
    Case("preempted, the newest damaged since", PREEMPTED, 75, steps=(60, -80), exit_code=1,
         wrong=(f"the checkpoint of step 80 is damaged ({MODEL} is missing): a restart resumes",),
         advice=FROM_60, commands=("elastic-ckpt list {job}", RERUN)),
    Case("no checkpoint is intact", FAILED, 65, steps=(-60,), exit_code=2,
         wrong=("there are checkpoints, and none is intact: a restart has nothing to load; the "
         "newest, step 60: ",),
         advice="a rerun would end the same way",
         commands=("elastic-ckpt list {job}", "elastic-ckpt list {job}")),
    Case("two checkpoints were damaged", FAILED, 65, "2 checkpoints in a row failed verification",
         advice=f"fix the storage (elastic-ckpt list), then {FROM_60}", exit_code=2,
         commands=("elastic-ckpt list {job}", RERUN)),
    Case("the wrong data set", FAILED, 65, "the data set is another one", exit_code=2,
         advice=f"correct what the message says does not match, then {FROM_60}; to train on other",
         commands=(RERUN,)),
    Case("an option of run after the script", FAILED, 70, "no retry: rank 0 failed: exit code 2", {
         "command": RunCommand(MISPLACED, "/", options=4),
         "last_failure": failure(0, "start-up", "exit code 2", "usage: t.py [--x]")}, exit_code=2,
         advice="--keep-last is an option of run, and must stand before the script; correct that",
         commands=("cd / && elastic-ckpt run --dir ck t.py --keep-last 3 --x",)),
    Case("an option that is not run's", FAILED, 70, "no retry: rank 0 failed: exit code 2", {
         "last_failure": failure(0, "start-up", "exit code 2", "usage: t.py [--x]")}, exit_code=2,
         advice="see why it failed", commands=("elastic-ckpt logs --last --rank 0 {job}", RERUN)),
    Case("other data than the run that trained", FAILED, 65, "the data set is another one", {
         "trained": RunCommand(("elastic-ckpt", "run", "--dir", "ck", "t.py", "--data", "9"), "/")},
         advice="correct what the message says does not match; it was trained with the command "
         "below, with which it resumes from step 60; to train on other", exit_code=2,
         commands=("cd / && elastic-ckpt run --dir ck t.py --data 9",)),
    Case("other data by the same command", FAILED, 65, "the data set is another one", {
         "trained": RunCommand(tuple(RERUN.partition("&& ")[2].split()), "/work")}, exit_code=2,
         advice=f"so what it reads has changed; then {FROM_60}", commands=(RERUN,)),
    Case("the budget is spent", FAILED, 70, "4 failures without progress: rank 1 failed", {
         "last_failure": failure(1, "error", "ValueError: nan", "Traceback", "ValueError: nan")},
         advice=f"(elastic-ckpt logs --last --rank 1), fix that, then {FROM_60}", exit_code=2,
         commands=("elastic-ckpt logs --last --rank 1 {job}", RERUN)),
    Case("the workers were killed in silence", FAILED, 70, "", {
         "last_failure": failure(1, "signal", "killed by SIGKILL")}, exit_code=2,
         advice="see why it failed",
         commands=("elastic-ckpt logs --processes --last {job}", RERUN)),
    Case("it hung too often", FAILED, 70, "", {
         "last_failure": failure(1, "hang", "no progress for 60 s in step 9", "step 8")},
         advice="see why it failed (elastic-ckpt logs --last --rank 1; the report shows each "
         "rank's stack), fix that, then rerun", exit_code=2, commands=(
         "elastic-ckpt logs --last --rank 1 {job}", "elastic-ckpt report {job}", RERUN)),
    Case("it hung on another node", FAILED, 70, "", {
         "last_failure": failure(1, "hang", "no progress for 60 s in step 9")}, prepare=printed,
         advice="see why it failed (elastic-ckpt logs --last --rank 1;", exit_code=2, commands=(
         "elastic-ckpt logs --last --rank 1 {job}", "elastic-ckpt report {job}", RERUN)),
    Case("it hung in silence", FAILED, 70, "", {
         "last_failure": failure(1, "hang", "no progress for 60 s in step 9")}, exit_code=2,
         advice="see why it failed", commands=("elastic-ckpt report {job}", RERUN)),
    Case("the storage failed", FAILED, 70, "", {
         "last_failure": failure(0, "storage", "StorageFailed: rank 0 could not load", "x")},
         advice=f"fix the storage (elastic-ckpt doctor), then {FROM_60}", exit_code=2,
         commands=("elastic-ckpt doctor {job}", RERUN)),
    Case("the last checkpoint is in memory only", FAILED, 70, "the work is done, but step 60 is in "
         "memory only: fix the storage", exit_code=2, advice="then rerun the same command on this "
         "node, which only stores what is done", commands=("elastic-ckpt doctor {job}", RERUN)),
    Case("a worker cannot be killed", FAILED, 70, "the workers could not be launched: rank 1 "
         "(process 7, state D) is still there 300 s after SIGKILL, with its GPU memory and files",
         advice="repair what the worker waits for, or restart the machine; rerun", exit_code=2,
         commands=(RERUN,)),
    Case("used wrongly", FAILED, 64, "UsageError: batch_size is missing", exit_code=2,
         advice=f"correct what the message says, then {FROM_60}", commands=(RERUN,)),
    Case("the wrong rule of completeness", FAILED, 64, "none has x; they were left where they are",
         advice="correct --complete-when in this command:", commands=(RERUN,), exit_code=2),
    Case("no match of --watch", PREEMPTED, 76, "", NOTHING, steps=(), exit_code=1,
         wrong=("nothing was sealed: --watch a*: nothing is there",), commands=(HELP, RERUN),
         advice="if --watch and --complete-when are right, rerun the same command: it starts at"),
    Case("no match is complete", PREEMPTED, 76, "", NO_MARK, steps=(), exit_code=1,
         wrong=("nothing was sealed: 2 are there, none complete",), commands=(HELP, RERUN),
         advice="correct --complete-when in this command; as it is, it ends with 64:"),
    Case("finished without a match", FINISHED, 0, "", NOTHING, steps=(), commands=(HELP,),
         wrong=("nothing was sealed: --watch a*",), advice="nothing is left to do"),
    Case("another run watches the output", FAILED, 73, "another run on this machine watches out/*",
         steps=(), exit_code=2, commands=(RERUN,), advice="stop the other run or change --watch"),
    Case("the directory was unmounted", FAILED, 73, "step 60 is not there any more, because",
         steps=(), advice="put the directory back, then rerun the same command; as it is now, it "
         "starts at step 0", commands=(RERUN,), exit_code=2),
    Case("another run owns the job", FAILED, 73, "pid 7 on far has taken over /ck: this run stops",
         advice="nothing is to be done here: another run continues the job; see how it is:",
         commands=("elastic-ckpt status {job}",), exit_code=2),
    Case("killed", record={"owner": gone()}, advice=FROM_60, commands=(RERUN,), exit_code=2),
    Case("finished without a step", FINISHED, 0, "", {"stepless_since": 1.0}, steps=(),
         wrong=("no step was seen in the script's Session",), advice="nothing is left to do"),
    Case("preempted without a Session", PREEMPTED, 76, "", {"sessionless": True}, steps=(),
         wrong=("the script creates no Session, so there are no checkpoints: create one around",),
         advice="it starts at step 0, as each rerun does until the script creates a Session",
         commands=("elastic-ckpt run --help", RERUN), exit_code=1),
    Case("failed without a Session", FAILED, 70, "", {"sessionless": True,
         "last_failure": failure(1, "error", "ValueError: nan", "x")}, steps=(), exit_code=2,
         wrong=("the script creates no Session",), advice="as each rerun does until the script",
         commands=("elastic-ckpt run --help", "elastic-ckpt logs --last --rank 1 {job}", RERUN)),
    Case("killed without a Session", record={"sessionless": True, "owner": gone()}, steps=(),
         wrong=("the script creates no Session",), advice="as each rerun does until the script",
         commands=("elastic-ckpt run --help", RERUN), exit_code=2),
    Case("preempted before its Session, with checkpoints", PREEMPTED, 76, "",
         {"sessionless": True}, advice=FROM_60, commands=(RERUN,), exit_code=1),
    Case("never started", None, steps=(), advice="start it with elastic-ckpt run", exit_code=2,
         commands=("elastic-ckpt run --dir {job} -- SCRIPT.py",)),
    Case("copied here", None, advice="start it with elastic-ckpt run: it resumes from step 60",
         commands=("elastic-ckpt run --dir {job} -- SCRIPT.py",), exit_code=2),
    Case("copied here damaged", None, steps=(-60,), exit_code=2,
         wrong=("there are checkpoints, and none is intact",), advice="a rerun would end the same",
         commands=("elastic-ckpt list {job}", "elastic-ckpt list {job}")),
]  # fmt: skip

WRONG = [
    Case("the disk is full", journal=(SAVED, SAVE_FAILED), exit_code=1,
         wrong=(f"the last save failed: {FULL}",), commands=("elastic-ckpt doctor {job}",)),
    Case("the disk is full of checkpoints", journal=(SAVED, SAVE_FAILED), steps=(20, 40, 60),
         wrong=("the last save failed",), commands=("elastic-ckpt prune {job} --keep-last 2",),
         exit_code=1),
    Case("a drain fails", journal=(("saved", {"step": 60, "tier": "memory"}),
         ("drain_failed", {"step": 60, "error": "Input/output error"})), exit_code=1,
         wrong=("the last save failed: in memory only: Input/output error",),
         commands=("elastic-ckpt doctor {job}",)),
    Case("no checkpoint is intact while it runs", steps=(-60,), exit_code=1,
         wrong=("there are checkpoints, and none is intact",),
         commands=("elastic-ckpt list {job}",)),
    Case("the newest was set aside", steps=(40, 60), prepare=aside,
         wrong=(f"the checkpoint of step 60 is damaged ({MODEL} is damaged): a restart resumes "
         "from step 40",), commands=("elastic-ckpt list {job}",)),
    Case("no Session", record={"sessionless": True}, exit_code=1,
         wrong=("the script creates no Session",), commands=("elastic-ckpt run --help",)),
    Case("no match of --watch", record=NOTHING, steps=(), exit_code=1, commands=(HELP,),
         wrong=("nothing is sealed after 30 d: --watch a*: nothing is there; correct it, unless "
         "the first save is still to come",)),
    Case("no match is complete", record=NO_MARK, steps=(), exit_code=1, commands=(HELP,),
         wrong=("nothing is sealed after 30 d: 2 are there, none complete",)),
    Case("no step in the Session", record={"stepless_since": 1.0}, exit_code=1,
         wrong=("no step for",)),
    Case("a node is left out", prepare=left_out, exit_code=1,
         wrong=("node n2 is left out since",), commands=("elastic-ckpt nodes {job} --let-in n2",)),
    Case("backing off", RunState.BACKING_OFF, None, "rank 1 failed: restarting in 30 s", {
         "last_failure": failure(1, "error", "ValueError: nan", "so it goes")}, exit_code=1,
         wrong=("rank 1 failed: ValueError: nan",),
         commands=("elastic-ckpt logs --last --rank 1 {job}",)),
    Case("the next failure is the last", record={"failures": 3, "failures_left": 0,
         "last_failure": failure(1, "error", "ValueError: nan", "so it goes")},
         wrong=("the failure budget is used up, so the next failure ends the job; the last one: "
         "rank 1 failed: ValueError: nan",), commands=("elastic-ckpt logs --last --rank 1 {job}",)),
    Case("another host is silent", record={"owner": ELSEWHERE}, exit_code=1,
         wrong=("no heartbeat from the supervisor for 60 s; it may be dead: if far is gone, re",),
         commands=(RERUN,)),
    Case("the mirror fails", record={"mirror": "s3://b/job: failing for 4 tries: no route",
         "bucket": "s3://b/job"}, wrong=("mirror s3://b/job: failing for 4 tries: no route",),
         commands=("elastic-ckpt doctor s3://b/job",)),
    Case("a replay differs", journal=(("audited", {"first": 20, "last": 40, "ranks": 2, "at": 31,
         "different": "step 31, rank 1: fc.weight"}),),
         wrong=("a replay of steps 21 to 40 differs at step 31, rank 1: fc.weight",),
         commands=("elastic-ckpt report {job}",)),
]  # fmt: skip

FINE = [
    Case("healthy", journal=(SAVED,)),
    Case("without a checkpoint yet", steps=()),
    Case("starting", RunState.STARTING, steps=()),
    Case("preempted before, recovered since", journal=(
        ("start", {}), ("launch", {"incarnation": 1}), ("end", {"state": "preempted"}),
        ("start", {}), ("launch", {"incarnation": 2}), SAVED)),
    Case("failed before, recovered since", record={"failures": 1, "failures_left": 2,
         "last_failure": failure(1, "error", "ValueError: nan", "so it goes")}),
    Case("a run without a budget", record={"failures": 0, "failures_left": 0}),
    Case("a save failed, the next did not", journal=(SAVE_FAILED, SAVED)),
    Case("set aside, and saved past it", steps=(40, 60, 80), prepare=aside),
    Case("another program's directory", prepare=lambda job: job.checkpoint(9, 9).mkdir()),
    Case("the mirror hiccups", record={"mirror": "s3://b/job: failing for 1 tries: no route"}),
    Case("the mirror works", record={"mirror": "s3://b/job: step 60, sealed 03:12:40"}),
]  # fmt: skip


def put(job: JobDirectory, case: Case, board: Board | None = None) -> str:
    """Bring a job into the case's situation; return its page without ``-v``."""
    for step in case.steps:
        made = make_checkpoint(job, abs(step))
        if step < 0:
            (made / MODEL).unlink()
    now, mono = time.time() - len(case.journal), time.monotonic() - len(case.journal)
    lines = [
        encode_line(happened(now + at, name, data, monotonic=mono + at, node="here"))
        for at, (name, data) in enumerate(case.journal)
    ]
    job.journal("here").write_bytes(b"".join(line + b"\n" for line in lines))
    case.prepare(job)
    if case.state is not None:
        command = RunCommand(tuple(RERUN.partition("&& ")[2].split()), "/work")
        fields = {"owner": ProcessIdentity.current(), "command": command, "incarnation": 1}
        NodeRecord(
            job="tested", run_id="1", node="here", since=time.time() - 7200, state=case.state,
            exit_code=case.code, message=case.message or case.state.value,
            board=board.path if board else "", **(fields | case.record),
        ).write(job.node_record("here"))  # fmt: skip
    view = gather(job)
    assert view.exit_code == case.exit_code
    return shown(job)


def shown(job: JobDirectory, width: int = 400) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(page(gather(job), width))
    return captured.get()


def check(job: JobDirectory, case: Case, text: str) -> None:
    lines = [line.rstrip() for line in text.splitlines()]
    wrong = [line[2:] for line in lines if line.startswith("! ")]
    assert len(wrong) == len(case.wrong), wrong
    for line, begin in zip(wrong, case.wrong, strict=True):
        assert line.startswith(begin)
    advice = [line[2:] for line in lines if line.startswith("→ ")]
    assert len(advice) == bool(case.advice), advice
    assert not case.advice or case.advice in advice[0]
    commands = [line[2:] for line in lines if line.startswith(("  elastic-ckpt ", "  cd "))]
    assert commands == [one.format(job=job.root) for one in case.commands]
    first = next(at for at, line in enumerate(lines) if not line.startswith(("!", "  ")))
    assert not any(line.startswith("!") for line in lines[first:]), "what is wrong comes first"


@pytest.mark.parametrize("case", ENDINGS, ids=lambda case: case.name)
def test_each_ending_has_the_right_advice(job: JobDirectory, case: Case) -> None:
    check(job, case, put(job, case))


def test_a_script_that_finished_without_a_supervisor_is_finished(job: JobDirectory) -> None:
    make_checkpoint(job, 20)
    assert gather(job).state == "unknown"
    make_checkpoint(job, 40, reason="final")
    view = gather(job)
    assert (view.state, view.exit_code) == ("finished", 0)
    assert view.message == "a script without a supervisor has finished"
    assert view.commands == (f"elastic-ckpt list {job.root}",)


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_what_is_wrong_comes_first_with_its_command(job: JobDirectory, case: Case) -> None:
    check(job, case, put(job, case, two_ranks()))


@pytest.mark.parametrize("case", FINE, ids=lambda case: case.name)
def test_a_job_that_is_fine_takes_six_lines_and_raises_no_alarm(
    job: JobDirectory, case: Case
) -> None:
    check(job, case, put(job, case, two_ranks()))
    assert len(shown(job, 80).splitlines()) <= 6


LATE = "no step for 40 s, where one took 1 s: rank 1 is behind, training"
SLOW = "rank 1 is slow, and the others wait for it: its own work takes 2.5 x theirs"


@pytest.mark.parametrize(
    ("ranks", "begin", "command", "exit_code"),
    [
        pytest.param({"last_beat_seconds": 40.0, "step": 99}, LATE, "logs --last --rank 1", 1,
                     id="silent"),
        pytest.param({"slow": 2.5, "busy_seconds": 0.9}, SLOW, "status -v", 0, id="slow"),
        pytest.param({"last_beat_seconds": 8.0}, "", "", 0, id="silent for some seconds"),
        pytest.param({"last_beat_seconds": 40.0, "step_seconds": 30.0}, "", "", 0, id="long steps"),
        pytest.param({"last_beat_seconds": 40.0, "step_seconds": None}, "", "", 0, id="compiles"),
        pytest.param({"last_beat_seconds": 40.0, "phase": "fetching"}, "", "", 0, id="slow data"),
        pytest.param({"last_beat_seconds": 400.0, "phase": "evaluating"}, "", "", 0,
                     id="evaluates"),
        pytest.param({"last_beat_seconds": 400.0, "phase": "saving"}, "", "", 0, id="saves"),
        pytest.param({"slow": 1.5, "busy_seconds": 0.9}, "", "", 0, id="a little slower"),
        pytest.param({"slow": 3.0, "busy_seconds": 0.1}, "", "", 0, id="slow at little work"),
    ],
)  # fmt: skip
def test_ranks_that_are_late_or_slow_are_named_and_noise_is_not(
    job: JobDirectory,
    monkeypatch: pytest.MonkeyPatch,
    ranks: dict[str, Any],
    begin: str,
    command: str,
    exit_code: int,
) -> None:
    """A silence counts of all ranks only, as the others wait for the one that is late."""
    both = {name: ranks[name] for name in ("last_beat_seconds", "phase", "step_seconds")
            if name in ranks}  # fmt: skip

    def views(boards: Any) -> Any:
        first, second = worker_views(boards)
        return [msgspec.structs.replace(first, **both), msgspec.structs.replace(second, **ranks)]

    monkeypatch.setattr(status_view, "worker_views", views)
    wrong, commands = ((begin,), (f"elastic-ckpt {command} {{job}}",)) if begin else ((), ())
    case = Case("", journal=(SAVED,), wrong=wrong, commands=commands, exit_code=exit_code)
    check(job, case, put(job, case, two_ranks()))


def a_minute_apart(job: JobDirectory) -> None:
    for ago, path in enumerate(scan(job), 1):
        os.utime(path, (time.time() - 60 * ago,) * 2)


def with_a_rule(job: JobDirectory) -> None:
    a_minute_apart(job)
    note_rule(job, Retention(last=4))


MANY = (20, 40, 60, 80)  # of 3 kB each
SOON = "at this pace the disk is full in 15 min: a checkpoint takes 3.0 kB of the 45.0 kB left, and"


@pytest.mark.parametrize(
    ("case", "free", "begin"),
    [
        pytest.param(Case("", steps=MANY, prepare=a_minute_apart), 45_000, SOON, id="soon"),
        pytest.param(Case("", steps=MANY, prepare=a_minute_apart), 9_000_000, "", id="in two days"),
        pytest.param(Case("", steps=MANY, prepare=with_a_rule), 45_000, "", id="retention"),
        pytest.param(Case("", steps=MANY[:3], prepare=a_minute_apart), 45_000, "", id="too few"),
    ],
)
def test_a_disk_that_fills_up_is_named_in_time(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch, case: Case, free: int, begin: str
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _: free)
    command = ("elastic-ckpt prune {job} --keep-last 2",) if begin else ()
    found = replace(case, wrong=(begin,) * bool(begin), commands=command, exit_code=bool(begin))
    check(job, found, put(job, found))


def test_ranks_that_are_silent_for_some_seconds_show_no_rate(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("", journal=(SAVED,))
    assert "steps/s" in put(job, case, board := two_ranks())

    def views(boards: Any) -> Any:
        return [
            msgspec.structs.replace(one, last_beat_seconds=6.0, step_seconds=0.06)
            for one in worker_views(boards)
        ]

    monkeypatch.setattr(status_view, "worker_views", views)
    text = shown(job)
    assert "no step for 6 s" in text and "steps/s" not in text and "!" not in text
    assert board.incarnation == 1


def test_the_last_lines_are_those_of_the_rank_that_failed(job: JobDirectory) -> None:
    last = failure(1, "error", "ValueError: nan", "Traceback", "ValueError: the data of this step")
    case = Case("", FAILED, 70, "gave up", {"last_failure": last}, exit_code=2)
    text = put(job, case)
    assert "  Traceback\n  ValueError: the data of this step" in "\n".join(
        line.rstrip() for line in text.splitlines()
    )


def test_a_healthy_page_says_what_where_since_when_and_what_a_loss_costs(
    job: JobDirectory,
) -> None:
    case = Case(
        "", RunState.RUNNING, None, "training, incarnation 2", steps=(60,),
        journal=(
            ("start", {}), ("launch", {"incarnation": 1}), ("state", {"state": "running"}),
            ("crash", {"rank": 1, "kind": "signal", "message": "killed by SIGKILL"}),
            ("launch", {"incarnation": 2}), ("state", {"state": "running"}), SAVED,
        ),
    )  # fmt: skip
    board = two_ranks()
    put(job, case, board)
    lines = [line.rstrip() for line in shown(job, 100).splitlines()]
    assert len(lines) == 5
    assert lines[0] == "tested  running  training, incarnation 2, 2 ranks, for 2 h"
    assert lines[1].startswith("progress   step 100 of 400 (25%), 5 min to the end, 1 steps/s")
    assert lines[2].startswith("newest     step 60, ") and "on disk" in lines[2]
    assert lines[3].startswith("at risk    40 steps, ")
    assert "s ago: failure, rank 1 (signal): killed by SIGKILL" in lines[4]


def test_of_a_hang_the_rank_to_blame_is_shown_with_all_stacks(job: JobDirectory) -> None:
    stacks = {"0": ["all_reduce (torch/distributed/c10d.py:1)"], "1": ["recv", "get (train.py:7)"]}
    case = Case(
        "", FAILED, 70, "step 9 failed 3 times",
        {"last_failure": failure(1, "hang", "no progress")},
        journal=(
            ("start", {}), ("launch", {"incarnation": 1}),
            ("hang", {"rank": 1, "stacks": stacks}), ("ended", {"kind": "crashed", "rank": 1}),
            ("crash", {"rank": 1, "kind": "hang", "message": "no progress"}),
        ),
        prepare=printed, exit_code=2,
    )  # fmt: skip
    text = put(job, case)
    assert "rank 1: downloading" in text and "rank 0: downloading" not in text
    console = Console(width=200)
    with console.capture() as captured:
        console.print(page(gather(job), 200, verbose=True))
    for line in ("rank 1: downloading", "rank 0: all_reduce", "rank 1: get (train.py:7)"):
        assert line in captured.get()
    assert "rank 0: downloading" not in captured.get()


def test_what_is_said_of_the_newest_is_not_read_as_of_the_one_on_the_disk(
    job: JobDirectory,
) -> None:
    view = gather(job)
    newest = NewestView(256, "/m", "memory", 921_500, 32.0, "emergency", False)
    on_disk = NewestView(100, "/d", "disk", 4000, 90.0, "interval", False)
    shown = msgspec.structs.replace(view, newest_intact=newest, newest_on_disk=on_disk)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(page(shown, 200))
    assert captured.get().rstrip().endswith("step 256, 32 s old, in memory; on disk: step 100")


def test_no_older_checkpoint_is_promised_where_none_is_intact(job: JobDirectory) -> None:
    aside = "2 checkpoints in a row failed verification and were moved to q"
    told = f"{aside}: fix the storage, then rerun the same command to resume from an older one"
    text = put(job, Case("", FAILED, 65, told, steps=(-60,), exit_code=2))
    assert aside in text and "fix the storage" not in text
    make_checkpoint(job, 40)
    assert told in shown(job)
