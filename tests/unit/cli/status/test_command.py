"""``status``: its page, its JSON against the schema, its warnings and advice."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from rich.console import Console

from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.memory.owned_tier import OwnedTier
from elastic_ckpt.checkpoint.ownership.job_lock import HeldLock
from elastic_ckpt.cli.status import workers as worker_view
from elastic_ckpt.cli.status.page import page
from elastic_ckpt.cli.status.view import StatusView, gather
from elastic_ckpt.jobdir.node_record import (
    FailureRecord,
    NodeRecord,
    NoticeRecord,
    ProcessIdentity,
    RecoveryRecord,
)
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.events import Saved, WorkersLaunched
from elastic_ckpt.journal.journal import Journal, read_journal
from elastic_ckpt.journal.line import encode_line
from elastic_ckpt.journal.node_events import Replicated
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.protocol.slot import MAX_METRICS, Phase
from scripts.schemas import status_schema
from tests.checkpoints import MODEL, make_checkpoint, make_header, open_job
from tests.journals import happened

pytestmark = pytest.mark.one_torch

SCHEMA = Path(__file__).parents[4] / "docs" / "schemas" / "status.json"


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


def record(job: JobDirectory, state: RunState, **more: Any) -> None:
    made = NodeRecord(
        job="tested", run_id="1", node="here", owner=ProcessIdentity.current(),
        since=time.time(), state=state, **more,
    )  # fmt: skip
    made.write(job.node_record("here"))


def write_events(job: JobDirectory, *events: tuple[float, str, dict[str, Any]]) -> None:
    """Write a journal of events, given in seconds ago."""
    now, mono = time.time(), time.monotonic()
    lines = [
        encode_line(happened(now - ago, name, data, monotonic=mono - ago, node="here"))
        for ago, name, data in events
    ]
    job.journal("here").write_bytes(b"\n".join(lines) + b"\n")


@pytest.fixture
def board() -> Board:
    board = Board.create(2)
    board.begin_incarnation(1)
    for rank in (0, 1):
        slot = board.rank_slot(rank)
        slot.launched(rank, os.getpid())
        slot.attach(20)
        slot.first_entry()
        slot.phase(Phase.TRAINING)
        slot.step(101 + rank, 100 + rank, 0, 800)
        slot.goal(400, 8)
    return board


@pytest.fixture
def training(job: JobDirectory, board: Board) -> JobDirectory:
    """A job that has trained for 80 s at a step per second, saved at step 60 on the disk."""
    make_checkpoint(job, 60)
    record(
        job, RunState.RUNNING, board=board.path, incarnation=1, failures_left=3,
        message="training, incarnation 1",
    )  # fmt: skip
    write_events(
        job,
        (90, "start", {}),
        (88, "launch", {}),
        (80, "state", {"state": "running", "step": 20}),
        (80, "steps", {"step": 20, "samples_per_step": 8, "total_steps": 400}),
        (40, "saved", {"step": 60, "epoch": 0, "reason": "interval", "tier": "disk",
                       "seconds": 0.5, "stall_seconds": 0.5}),
    )  # fmt: skip
    return job


def shown(view: StatusView, width: int = 100, **options: Any) -> str:
    console = Console(width=width, **options)
    with console.capture() as captured:
        console.print(page(view, width, verbose=True))
    return captured.get()


# -- JSON -------------------------------------------------------------------------------------


def test_the_published_schema_is_current() -> None:
    """python scripts/schemas.py docs/schemas/status.json writes it."""
    assert json.loads(SCHEMA.read_text()) == status_schema()
    jsonschema.Draft202012Validator.check_schema(status_schema())


def check_schema(view: StatusView) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(msgspec.json.encode(view))
    jsonschema.validate(found, json.loads(SCHEMA.read_text()))
    return found


def test_every_kind_of_job_matches_the_schema(
    job: JobDirectory, training: JobDirectory, tmp_path: Path
) -> None:
    never_ran = check_schema(gather(open_job(tmp_path / "other")))
    assert (never_ran["progress"], never_ran["at_risk"], never_ran["workers"]) == (None, None, [])
    runs = check_schema(gather(training))
    assert len(runs["workers"]) == 2 and runs["progress"]["total_steps"] == 400
    (job.checkpoint(0, 60) / MODEL).unlink()
    record(
        job, RunState.PREEMPTED, exit_code=75, message="preempted, saved",
        last_failure=FailureRecord(1, "signal", "killed by SIGKILL", ("last words",), time.time()),
        last_recovery=RecoveryRecord(2, 1.5, {"detect": 0.5, "load": 1.0}, 60, "disk"),
    )  # fmt: skip
    over = check_schema(gather(job))
    assert over["rejected"] and over["last_failure"]["tail"] == ["last words"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**over, "workers": None}, json.loads(SCHEMA.read_text()))


# -- how far, and what is at risk ---------------------------------------------------------------


def test_progress_rate_and_time_to_the_end(training: JobDirectory) -> None:
    """80 steps took 80 s; 300 are left."""
    found = gather(training).progress
    assert found is not None and (found.step, found.total_steps) == (100, 400)
    assert found.steps_per_second == pytest.approx(1.0, rel=0.05)
    assert found.samples_per_second == pytest.approx(8.0, rel=0.05)
    assert found.seconds_to_end == pytest.approx(300.0, rel=0.05)
    text = shown(gather(training))
    assert "step 100 of 400" in text and "5 min to the end" in text and "25%" in text


def test_at_risk_is_the_work_since_the_save_on_the_disk(training: JobDirectory) -> None:
    """The disk has step 60, the state of 40.5 s ago; half a second of that was the save."""
    risk = gather(training).at_risk
    assert risk is not None and risk.steps == 40
    assert risk.seconds == pytest.approx(40.0, abs=2.0)
    assert "40 steps, 40 s of training, if this node died now" in shown(gather(training))


@pytest.mark.parametrize(
    ("copied", "steps"),
    [
        pytest.param({"n1": 90, "n2": 90}, 10, id="each node has its copy"),
        pytest.param({"n1": 90}, 40, id="one has not"),
        pytest.param({"n1": 50, "n2": 50}, 40, id="the disk has a newer one"),
    ],
)
def test_what_other_nodes_have_copied_is_not_at_risk(
    training: JobDirectory, copied: dict[str, int], steps: int
) -> None:
    leads = Journal(training, "n1", rotates=False)
    leads.write(WorkersLaunched(incarnation=1, nproc=1, nodes=2))
    for step in set(copied.values()):
        leads.write(Saved(step=step, tier="memory", reason="interval"))
    for node, step in copied.items():
        Journal(training, node, follows=node != "n1").write(Replicated(host="x", step=step))
    risk = gather(training).at_risk
    assert risk is not None and risk.steps == steps


@pytest.mark.parametrize("leads", [True, False])
@pytest.mark.parametrize(
    ("is_copied", "bucket", "now", "steps"),
    [
        pytest.param(True, "s3://b/job", 1, 10, id="another node has a copy of this one's share"),
        pytest.param(True, "s3://b/job", 2, 40, id="it had one before nodes came or went"),
        pytest.param(False, "s3://b/job", 1, 40, id="none has: it goes with this node"),
        pytest.param(True, "", 1, 40, id="on a shared disk the journal tells it of all nodes"),
    ],
)
def test_a_node_without_the_others_journals_knows_what_is_copied(
    training: JobDirectory, board: Board, tmp_path: Path, leads: bool, is_copied: bool,
    bucket: str, now: int, steps: int,
) -> None:  # fmt: skip
    """In its journal are its own copies of other nodes' shares, and on the head the saves."""
    owned = OwnedTier(tmp_path, training, "here")
    attempt = owned.tier.begin(90, 0)
    header = make_header(DiskAttempt(training, attempt.ref.attempt, 90))
    attempt.seal(header, [], Retention())
    (sealed,) = owned.tier.sealed()
    if is_copied:
        sealed.generation.note_copied(sealed.seal)
    record(
        training, RunState.RUNNING, board=board.path, incarnation=now, bucket=bucket,
        memory=str(owned.tier.root),
    )  # fmt: skip
    journal = Journal(training, "here", rotates=False)
    if leads:
        journal.write(WorkersLaunched(incarnation=1, nproc=1, nodes=2))
        journal.write(Saved(step=90, tier="memory", reason="interval"))
    journal.write(Replicated(host="x", step=90))
    risk = gather(training).at_risk
    owned.release(remove=True)
    assert risk is not None and risk.steps == steps
    if steps == 10:
        assert risk.seconds < 2.0


def test_steps_that_nobody_sees_are_at_risk_and_a_warning(job: JobDirectory, board: Board) -> None:
    since = time.time() - 480
    record(job, RunState.STARTING, board=board.path, incarnation=1, stepless_since=since)
    view = gather(job)
    assert view.exit_code == 1 and view.at_risk is not None
    assert (view.at_risk.steps, round(view.at_risk.seconds)) == (None, 480)
    assert "8 min of training, if this node died now" in shown(view)
    assert "no step for 8 min in the open Session, so nothing is saved" in view.warnings[0]
    record(job, RunState.FINISHED, exit_code=0, stepless_since=since)
    over = gather(job)
    assert "no step was seen in the script's Session" in over.warnings[0]


def test_without_a_checkpoint_all_training_is_at_risk(
    job: JobDirectory, training: JobDirectory
) -> None:
    (job.checkpoint(0, 60) / "manifest.json").unlink()
    risk = gather(training).at_risk
    assert risk is not None and risk.steps == 100
    assert risk.seconds == pytest.approx(79.5, abs=2.0)


def test_a_script_with_its_own_step_count_shows_that(job: JobDirectory, board: Board) -> None:
    """Such as one that restarts the count in each epoch."""
    for rank in (0, 1):
        board.rank_slot(rank).attach(0, declares=False)
        board.rank_slot(rank).own_step(7)
    make_checkpoint(job, 60)
    record(job, RunState.RUNNING, board=board.path, incarnation=1)
    view = gather(job)
    assert view.position is not None and view.position.step == 7
    assert [worker.step for worker in view.workers] == [7, 7]
    assert view.at_risk is not None and view.at_risk.steps == 0  # of the same epoch


def test_reported_metrics_are_shown(job: JobDirectory, board: Board) -> None:
    slot = board.rank_slot(0)
    for number in range(MAX_METRICS + 3):
        slot.metric(f"metric {number}", number / 3)
    slot.metric("metric 0", 0.25)
    slot.metric("long " * 20, 1.0)
    record(job, RunState.RUNNING, board=board.path, incarnation=1)
    view = gather(job)
    assert view.reported["metric 0"] == 0.25 and len(view.reported) == MAX_METRICS
    assert "metric 0 0.25" in shown(view)


# -- warnings and advice -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "events", "warning"),
    [
        ({"sessionless": True}, [], "no Session"),
        ({}, [(1, "save_failed", {"step": 5, "error": "No space left on device"})], "No space"),
        ({}, [(2, "saved", {"step": 5, "tier": "memory"}),
              (1, "drain_failed", {"step": 5, "error": "I/O error"})], "I/O error"),
    ],
)  # fmt: skip
def test_a_degraded_job_shows_why(
    job: JobDirectory, board: Board, more: Any, events: Any, warning: str
) -> None:
    record(job, RunState.RUNNING, board=board.path, incarnation=1)
    assert (gather(job).exit_code, gather(job).warnings) == (0, [])
    record(job, RunState.RUNNING, board=board.path, incarnation=1, **more)
    write_events(job, *events)
    view = gather(job)
    assert view.exit_code == 1 and warning in view.warnings[0]
    assert f"! {view.warnings[0][:20]}" in shown(view)


def test_checkpoints_of_which_none_is_intact_are_a_warning(
    job: JobDirectory, training: JobDirectory
) -> None:
    (job.checkpoint(0, 60) / MODEL).unlink()
    view = gather(training)
    assert view.exit_code == 1 and "none is intact" in view.warnings[0]
    assert "none intact: a restart would end with 65" in shown(view)
    assert f"epoch-0_step-60: {MODEL} is missing" in shown(view)


@pytest.mark.parametrize(
    ("state", "code", "exit_code", "words"),
    [
        (
            RunState.PREEMPTED,
            75,
            1,
            "rerun the same command, unless systemd or SLURM does: it resumes from",
        ),
        (RunState.FAILED, 70, 2, "elastic-ckpt logs --processes --last"),
        (RunState.FAILED, 65, 2, "correct what the message says does not match"),
        (RunState.FINISHED, 0, 0, "nothing is left to do"),
    ],
)
def test_advice_for_a_job_that_has_ended(
    job: JobDirectory, state: RunState, code: int, exit_code: int, words: str
) -> None:
    make_checkpoint(job, 60)
    record(job, state, exit_code=code, message=state.value)
    view = gather(job)
    assert view.exit_code == exit_code and words in view.advice
    assert bool(view.advice) == bool(words) and view.warnings == []
    assert ("→" in shown(view)) == bool(words)


def test_a_script_without_a_supervisor_is_shown(job: JobDirectory) -> None:
    """Such as under torchrun: its leader holds the lock, and no supervisor has a record."""
    assert gather(job).exit_code == 2
    held = HeldLock(job.lock, run_id="script-1")
    try:
        view = gather(job)
        assert (view.state, view.exit_code, view.advice) == ("running", 0, "")
        assert f"without a supervisor, pid {os.getpid()}" in view.message
    finally:
        held.release()
    Journal(job, "here").write(Saved(step=1, epoch=0, seconds=1.0, stall_seconds=1.0))
    assert gather(job).goodput is None and "goodput" not in shown(gather(job))


# -- the page -----------------------------------------------------------------------------------


@pytest.fixture
def full(training: JobDirectory, board: Board) -> JobDirectory:
    """A job with something in each line of the page."""
    record(
        training, RunState.DRAINING, board=board.path, incarnation=1, failures=1, failures_left=2,
        message="SIGTERM: saving, 30 s left", grace=30.0,
        notice=NoticeRecord("signal", "SIGTERM", time.monotonic() + 23.5),
        last_failure=FailureRecord(1, "signal", "killed", ("its last words",), time.time() - 60),
        last_recovery=RecoveryRecord(2, 1.5, {"detect": 0.5, "load": 1.0}, 60, "disk"),
    )  # fmt: skip
    (make_checkpoint(training, 80) / MODEL).unlink()
    board.rank_slot(1).pace(900_000_000, 1_000_000_000)
    board.rank_slot(0).pace(100_000_000, 1_000_000_000)
    return training


@pytest.mark.parametrize("width", [20, 40, 59, 60, 80, 200])
def test_the_page_is_complete_at_any_width(full: JobDirectory, width: int) -> None:
    text = " ".join(shown(gather(full), width).split())
    for words in (
        "draining", "SIGTERM from signal", "23 s left", "100 of 400", "newest intact", "at risk",
        "rejected", "last save", "stalled", "last failure", "killed", "last recovery",
        "2 left", "goodput", "training", "stall", "setup", "alive", "SLOW",
    ):  # fmt: skip
        # A narrow terminal may fold within a word.
        assert words.replace(" ", "") in text.replace(" ", ""), words


def test_the_bar_is_readable_without_colours(full: JobDirectory) -> None:
    plain = shown(gather(full), color_system=None)
    bar = next(line for line in plain.splitlines() if re.search("█+▓?░+$", line.rstrip()))
    assert bar.count("█") > bar.count("░") > 2
    assert len(bar.strip()) == 40


def test_the_bar_has_a_constant_length(job: JobDirectory) -> None:
    """The rounded parts fill it."""
    write_events(
        job,
        (100, "start", {}),
        (93.3, "state", {"state": "running", "step": 0}),
        (50, "saved", {"step": 60, "seconds": 7.7, "stall_seconds": 7.7}),
        (33.1, "ended", {"kind": "crashed"}),
        (22.2, "waiting", {}),
        (11.1, "launch", {}),
        (5.3, "loaded", {"step": 60}),
        (5.2, "state", {"state": "running", "step": 60}),
        (0, "ended", {"kind": "completed"}),
        (0, "end", {"exit_code": 0}),
    )
    record(job, RunState.FINISHED, exit_code=0)
    lines = [line.strip() for line in shown(gather(job)).splitlines()]
    [bar] = [line for line in lines if len(line) == 40 and set(line) <= set("█▓x▒·░")]
    assert set(bar) == set("█▓x▒·░")
    seconds = gather(job).time
    assert seconds.wall_seconds == pytest.approx(100.0, abs=0.1)
    assert seconds.lost_work_seconds == pytest.approx(16.9, abs=0.1)
    assert seconds.waiting_seconds == pytest.approx(11.1, abs=0.1)


def test_of_many_ranks_the_outliers_are_shown(job: JobDirectory) -> None:
    board = Board.create(64)
    board.begin_incarnation(1)
    for rank in range(64):
        slot = board.rank_slot(rank)
        slot.launched(rank, os.getpid())
        slot.attach(0)
        slot.phase(Phase.TRAINING)
        slot.step(11, 9 if rank == 40 else 10, 0, 0)
        slot.pace(220_000_000 if rank != 57 else 1_980_000_000, 2_400_000_000)
    record(job, RunState.RUNNING, board=board.path, incarnation=1)
    view = gather(job)
    assert len(view.workers) == 64
    text = shown(view)
    assert re.search(r"^ +57 .*1980 of 2400 ms, SLOW: 9.0 x", text, re.MULTILINE)
    assert re.search(r"^ +40 .* 9 ", text, re.MULTILINE)
    assert "and 52 more ranks: training, step 10" in text


# -- GPUs ---------------------------------------------------------------------------------------


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Any], None]]:
    """A driver that answers as the test wants."""
    driver = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def answer(processes: Any) -> None:
        def running(_: int) -> list[Any]:
            if isinstance(processes, Exception):
                raise NVMLError
            if processes == "hangs":
                time.sleep(60)
            return [types.SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in processes]

        vars(driver).update(
            NVMLError=NVMLError,
            nvmlInit=lambda: None,
            nvmlShutdown=lambda: None,
            nvmlDeviceGetCount=lambda: 1,
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetUtilizationRates=lambda device: types.SimpleNamespace(gpu=87),
            nvmlDeviceGetComputeRunningProcesses=running,
        )

    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(worker_view, "NVIDIA_DEVICE", str(tmp_path))
    yield answer


def test_a_rank_shows_its_gpu(training: JobDirectory, nvml: Callable[[Any], None]) -> None:
    nvml([(os.getpid(), 40 * 10**9), (1, 5)])
    worker = gather(training).workers[0]
    assert (worker.gpu_bytes, worker.gpu_percent) == (40 * 10**9, 87.0)
    assert "40.0 GB, 87 %" in shown(gather(training))


@pytest.mark.parametrize("processes", [[], OSError(), "hangs"])
def test_a_driver_that_fails_or_hangs_is_ignored(
    training: JobDirectory,
    nvml: Callable[[Any], None],
    processes: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml(processes)
    monkeypatch.setattr(worker_view, "DRIVER_SECONDS", 0.3)
    view = gather(training)
    assert view.workers[0].gpu_bytes is None and "gpu" not in shown(view)


# -- a long journal ---------------------------------------------------------------------------


def test_step_marks_of_a_month_are_skipped(training: JobDirectory) -> None:
    """The account of time stays the same without the 86,400 marks."""
    path = training.journal("here")
    *first, start, mark, saved = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*first, start, *[mark] * 86_400, saved]) + b"\n")
    few = read_journal(training, marks=False)
    assert len(read_journal(training)) > 86_400 and len(few) < 100
    assert gather(training).time.stall_seconds == pytest.approx(0.5)
