"""The metrics of a given board, record and journal."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from elastic_ckpt import __version__
from elastic_ckpt.jobdir.node_record import (
    NodeRecord,
    NoticeRecord,
    ProcessIdentity,
    RecoveryRecord,
)
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.events import Crashed, RunStarted, Saved, StateChanged
from elastic_ckpt.journal.history import History
from elastic_ckpt.journal.journal import Journal, read_journal
from elastic_ckpt.journal.line import JournalEntry, encode_line
from elastic_ckpt.journal.time_account import Category
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.protocol.start_marks import Breakdown
from elastic_ckpt.supervisor.metrics import journal_follower
from elastic_ckpt.supervisor.metrics.collector import NodeCollector
from elastic_ckpt.supervisor.metrics.counts import (
    CAUSES,
    CRASHES,
    REASONS,
    TIERS,
    JobCounts,
    NewestCheckpoint,
)
from elastic_ckpt.supervisor.metrics.journal_follower import JournalFollower
from elastic_ckpt.supervisor.metrics.table import METRICS, Kind
from elastic_ckpt.supervisor.run_record import RunRecord
from tests.checkpoints import open_job
from tests.journals import happened

pytestmark = pytest.mark.one_torch

REPOSITORY = Path(__file__).parents[4]
DOCS = REPOSITORY / "docs" / "metrics.md"

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs prometheus")

Labels = dict[str, str]


def event(name: str, wall: float = 0.0, node: str = "here", **data: Any) -> JournalEntry:
    return happened(wall, name, data, monotonic=wall, node=node)


def history(*events: JournalEntry) -> JobCounts:
    found = JobCounts()
    for one in events:
        found.observe(one)
    return found


def saved(wall: float, step: int, tier: str = "disk", **data: Any) -> JournalEntry:
    path = f"/jobs/epoch-0_step-{step}"
    fields = {"path": path, "step": step, "epoch": 0, "reason": "interval", "bytes": 100}
    return event("saved", wall, tier=tier, **(fields | {"seconds": 1.0} | data))


# -- the history ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "cause"),
    [
        ([event("crash", kind="error")], "failure"),
        ([event("crash", kind="membership")], "resize"),
        ([event("ended", kind="stopped")], "resize"),
        ([event("end", exit_code=75), event("start")], "preemption"),
        ([event("crash", kind="hang"), event("end", exit_code=76), event("start")], "preemption"),
        ([event("end", exit_code=0), event("start")], "other"),
        ([event("crash", kind="error"), event("end", exit_code=70), event("start")], "other"),
        ([event("start")], "failure"),  # killed: it has no end
        ([event("end", exit_code=[75]), event("start")], "other"),
    ],
)
def test_cause_of_a_restart(between: list[JournalEntry], cause: str) -> None:
    found = history(event("start"), event("launch"), *between, event("launch"))
    assert found.restarts == dict.fromkeys(CAUSES, 0) | {cause: 1}


def test_a_failure_that_ends_the_job_is_not_a_restart() -> None:
    found = history(event("start"), event("launch"), event("crash", kind="start-up"))
    assert found.crashes["start-up"] == 1
    assert sum(found.restarts.values()) == 0


def test_saves_stalls_and_failures_are_counted() -> None:
    found = history(
        saved(1, 10, "memory", seconds=0.02, stall_seconds=0.01),
        saved(2, 20, "memory", seconds=5.0, stall_seconds=0.5),
        saved(3, 21, reason="emergency", seconds=0.01),
        event("save_failed", stall_seconds=2.0),
        event("drain_failed", step=20, seconds=9.0, error="full"),
        event("drained", path="/j/epoch-0_step-10", step=10, bytes=100, seconds=0.2),
    )
    counted = {key: count for key, count in found.saves.items() if count}
    assert counted == {("interval", "memory"): 2, ("emergency", "disk"): 1}
    assert (found.save_failures, found.drain_failures) == (1, 1)
    assert found.stall_seconds == pytest.approx(2.51)
    memory = dict(found.save_durations["memory"].buckets)
    assert (memory["0.01"], memory["0.03"], memory["3.0"], memory["10.0"]) == (0, 1, 1, 2)
    assert memory["+Inf"] == 2 and found.save_durations["memory"].sum == pytest.approx(5.02)
    disk = dict(found.save_durations["disk"].buckets)
    assert disk["0.01"] == 1  # a bound belongs to its bucket
    assert dict(found.drain_durations.buckets)["0.3"] == 1


def test_the_newest_checkpoint_is_what_a_restart_would_load() -> None:
    found = history(saved(1, 10), saved(2, 20, "memory"), saved(3, 30, "memory", bytes=7))
    assert found.newest("memory") == NewestCheckpoint(30, 3, 7)
    found.observe(event("drained", 4, path="/jobs/epoch-0_step-30", step=30, bytes=7, seconds=1))
    assert found.newest("disk") == NewestCheckpoint(30, 4, 7)
    found.observe(event("quarantined", 5, path="/jobs/epoch-0_step-30"))
    assert found.newest("disk") == NewestCheckpoint(10, 1, 100)
    assert found.quarantined == 1
    assert found.newest("memory") == NewestCheckpoint(20, 2, 100)
    found.observe(event("start", 6))
    assert found.newest("memory") is None and found.newest("disk") is not None
    found.observe(event("recovered", 7, path="/jobs/epoch-1_step-20", what="sealed"))
    found.observe(event("recovered", 8, path="/jobs/epoch-1_step-25", what="removed: torn"))
    assert found.newest("disk") == NewestCheckpoint(20, 7, None)


def test_the_newest_checkpoint_is_of_the_session_that_was_saved_last() -> None:
    first = saved(1, 900, path="/jobs/sessions/fold0/epoch-9_step-900")
    found = history(first, saved(2, 20, path="/jobs/sessions/fold1/epoch-0_step-20"))
    assert found.newest("disk") == NewestCheckpoint(20, 2, 100, "fold1")
    found.observe(event("quarantined", 3, path="/jobs/sessions/fold1/epoch-0_step-20"))
    assert found.newest("disk") == NewestCheckpoint(900, 1, 100, "fold0")


def test_what_the_script_saves_itself_counts_on_the_disk() -> None:
    kept = [f"/out/step-{step}.pt" for step in (100, 200)]
    found = history(
        *(
            event("saved", at, path=path, step=at * 100, tier="own", reason="script", seconds=1.2)
            for at, path in enumerate(kept, 1)
        )
    )
    assert found.saves["script", "disk"] == sum(found.saves.values()) == 2
    assert found.save_durations["disk"].sum == pytest.approx(2.4)
    assert found.newest("disk") == NewestCheckpoint(200, 2, 0)
    found.observe(event("quarantined", 3, path=kept[1]))
    assert found.newest("disk") == NewestCheckpoint(100, 1, 0)


def test_a_refused_memory_tier_has_no_newest_checkpoint() -> None:
    found = history(saved(1, 10, "memory"), event("memory_refused", path="/dev/shm/x/a"))
    assert found.newest("memory") is None


def test_events_of_nodes_that_do_not_lead_are_ignored() -> None:
    found = history(event("start"), event("launch"), event("launch", follows=True))
    assert sum(found.restarts.values()) == 0


junk: Any = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just([1])
names = ["start", "launch", "crash", "end", "saved", "save_failed", "drained", "quarantined"]
keys = ["kind", "exit_code", "reason", "tier", "step", "epoch", "bytes", "seconds", "path"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*names, "recovered", "state", "loaded"]),
            st.dictionaries(st.sampled_from([*keys, "stall_seconds", "what", "state"]), junk),
        )
    )
)
def test_any_journal_gives_known_labels_and_finite_numbers(
    entries: list[tuple[str, Labels]],
) -> None:
    found = history(*(event(name, i, **data) for i, (name, data) in enumerate(entries)))
    assert set(found.restarts) == set(CAUSES)
    assert set(found.crashes) == set(CRASHES)
    assert set(found.saves) == {(reason, tier) for reason in REASONS for tier in TIERS}
    assert found.stall_seconds >= 0
    for tier in TIERS:
        newest = found.newest(tier)
        assert newest is None or math.isfinite(newest.step)


def test_remembered_checkpoints_are_bounded() -> None:
    found = history(*(saved(step, step) for step in range(1, 1000)))
    assert found.newest("disk") == NewestCheckpoint(999, 999, 100)
    for step in range(999, 999 - 64, -1):
        found.observe(event("quarantined", path=f"/jobs/epoch-0_step-{step}"))
    assert found.newest("disk") is None


# -- the collector ----------------------------------------------------------------------------


class Node:
    """A node's board, record and journal, with a collector."""

    def __init__(self, directory: Path, *, head: str = "here", slots: int = 2) -> None:
        self.job: JobDirectory = open_job(directory / "job")
        self.board = Board.private(slots)
        self.journal = Journal(self.job, "here", follows=head != "here")
        record = NodeRecord(
            job='a "job"\n\x1b[2J', run_id="4711", node="here", owner=ProcessIdentity.current(),
            since=1000.5, state=RunState.RUNNING, incarnation=3, failures_left=2, head=head,
        )  # fmt: skip
        self.run = RunRecord(record, self.journal, lambda record: None, lambda line: None)
        self.feed = JournalFollower(self.job, "here") if head == "here" else None
        self.collector = NodeCollector(self.board, self.run, self.feed)
        self.registry = CollectorRegistry()
        self.registry.register(self.collector)

    def train(self, rank: int, finished: int, pid: int | None = None) -> None:
        slot = self.board.rank_slot(rank)
        slot.launched(rank, os.getpid() if pid is None else pid)
        slot.attach(0)
        slot.goal(total_steps=500, samples_per_step=16)
        slot.step(finished + 1, finished, 1, 16 * finished)
        slot.pace(busy_ns=250_000_000, step_ns=1_500_000_000)

    def exposed(self) -> dict[str, list[tuple[Labels, float]]]:
        """Return all series by name, without the label of the job's name, which each must have."""
        text = generate_latest(self.registry).decode()
        found: dict[str, list[tuple[Labels, float]]] = {}
        for family in text_string_to_metric_families(text):
            for one in family.samples:
                labels = dict(one.labels)
                assert labels.pop("job_name") == r'a "job"\n\x1b[2J'
                found.setdefault(one.name, []).append((labels, one.value))
        return found

    def value(self, name: str, **labels: str) -> float | None:
        values = [
            v
            for found, v in self.exposed().get(f"elastic_ckpt_{name}", ())
            if {label: text for label, text in found.items() if text} == labels  # as Prometheus
        ]
        return values[0] if values else None

    def follow(self) -> None:
        """Start to follow the journal, and wait until it was read."""
        assert self.feed is not None
        self.feed.start()
        limit = time.monotonic() + 10
        while self.feed.read(lambda history: True) is None:
            assert time.monotonic() < limit
            time.sleep(0.01)


@pytest.fixture
def node(tmp_path: Path):
    found = Node(tmp_path)
    yield found
    assert found.feed is not None
    found.feed.stop()
    for thread in threading.enumerate():
        if thread.name == "metrics-feed":
            thread.join(5)


def test_metrics_of_the_board_and_the_record(node: Node) -> None:
    node.train(0, 12)
    node.train(1, 11, pid=2**22 + 1)  # no such process
    node.board.rank_slot(0).metric("loss", 0.75)
    node.board.rank_slot(1).metric("loss", 9.0)  # ignored: only rank 0's count
    node.run.node.last_recovery = RecoveryRecord(3, 4.0, {"load": 1.5, "odd": 2.0}, 7, "disk")
    assert node.value("step") == 11
    assert node.value("final_step") == 500
    assert node.value("epoch") == 1
    assert node.value("epoch_samples") == 176
    assert node.value("step_samples") == 16
    assert node.value("reported", metric="loss") == 0.75
    assert node.value("worker_step_seconds", rank="1") == 1.5
    assert node.value("worker_busy_seconds", rank="0") == 0.25
    memory = node.value("worker_resident_memory_bytes", rank="0")
    assert memory is not None and memory > 1e6
    assert node.value("worker_resident_memory_bytes", rank="1") is None
    beat = node.value("worker_last_beat_timestamp_seconds", rank="0")
    assert beat is not None and 0 <= time.time() - beat < 60
    assert node.value("incarnation") == 3
    assert node.value("failures_left") == 2
    assert node.value("nodes") == 1
    assert node.value("start_time_seconds") == 1000.5
    assert node.value("state", state="running") == 1
    assert node.value("state", state="finished") == 0
    assert node.value("last_recovery_duration_seconds", stage="load") == 1.5
    assert node.value("last_recovery_duration_seconds", stage="detect") == 0
    assert node.value("last_recovery_duration_seconds", stage="odd") is None
    assert node.value("info", node_name="here", run_id="4711", version=__version__) == 1
    node.run.node.present = ("here", "there")
    assert node.value("nodes") == 2


def test_metrics_of_the_training_have_the_session(node: Node) -> None:
    node.train(0, 12)
    node.board.rank_slot(0).session("fold1")
    node.board.rank_slot(0).metric("loss", 0.75)
    assert node.value("step", session="fold1") == 12
    assert node.value("reported", session="fold1", metric="loss") == 0.75


def test_unknown_values_are_left_out(node: Node) -> None:
    shown = node.exposed()
    for name in ("step", "reported", "worker_step_seconds", "checkpoint_step", "final_step"):
        assert f"elastic_ckpt_{name}" not in shown
    node.board.rank_slot(0).launched(0, os.getpid())  # has not started to train
    assert "elastic_ckpt_step" not in node.exposed()


def test_the_deadline_is_present_only_with_a_notice(node: Node) -> None:
    assert node.value("notice_deadline_timestamp_seconds") is None
    node.run.node.notice = NoticeRecord("aws", "spot", time.monotonic() + 100)
    deadline = node.value("notice_deadline_timestamp_seconds")
    assert deadline is not None and 90 < deadline - time.time() <= 100


def test_a_node_that_does_not_lead_has_no_metrics_of_the_job(tmp_path: Path) -> None:
    node = Node(tmp_path, head="there")
    node.train(0, 12)
    of_node = {metric.name for metric in METRICS if not metric.of_job}
    absent = {"elastic_ckpt_notice_deadline_timestamp_seconds"}
    assert set(node.exposed()) == of_node - absent


def test_events_of_all_runs_are_counted(node: Node) -> None:
    """Those of earlier runs, and those written from now on."""
    now = time.time()
    lines = [
        event("start", now - 100), event("launch", now - 99),
        event("state", now - 90, state="running", step=0), saved(now - 50, 40, stall_seconds=1.0),
        event("crash", now - 40, kind="signal"), event("end", now - 30, exit_code=70),
    ]  # fmt: skip
    write(node.job, lines)
    node.follow()
    assert node.value("crashes_total", kind="signal") == 1
    assert node.value("saves_total", reason="interval", tier="disk") == 1
    assert node.value("checkpoint_step", tier="disk") == 40
    assert node.value("checkpoint_timestamp_seconds", tier="disk") == pytest.approx(now - 50)
    assert node.value("save_stall_seconds_total") == 1
    node.journal.write(RunStarted())
    node.journal.write(Saved(**saved(0, 50, "memory").data))
    assert node.value("saves_total", reason="interval", tier="memory") == 1
    assert node.value("checkpoint_step", tier="memory") == 50
    assert node.value("save_duration_seconds_count", tier="memory") == 1
    expected = History.of(read_journal(node.job)).account.goodput(time.time())
    for category in Category:
        found = node.value("time_seconds", category=category.value)
        assert found == pytest.approx(expected.seconds(category), abs=5)
    assert node.value("goodput_ratio") == pytest.approx(expected.fraction, abs=0.05)


def test_the_time_of_a_finished_run_stands_still(node: Node) -> None:
    now = time.time()
    write(node.job, [event("start", now - 5000), event("end", now - 4990, exit_code=0)])
    node.follow()
    node.run.node.state = RunState.FINISHED
    total = sum(value for _, value in node.exposed()["elastic_ckpt_time_seconds"])
    assert total == pytest.approx(10)


def test_there_are_no_counts_before_the_journal_was_read(node: Node) -> None:
    """Prometheus would take a count that starts at 0 and then is 57 for 57 new failures."""
    write(node.job, [event("crash", 1, kind="error")])
    assert "elastic_ckpt_crashes_total" not in node.exposed()
    node.follow()
    assert node.value("crashes_total", kind="error") == 1


def test_events_written_during_the_first_read_count_once(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_late(job: JobDirectory, **how: bool) -> list[JournalEntry]:
        node.journal.write(Crashed(kind="error"))
        return read_journal(job, **how)

    node.journal.write(Crashed(kind="error"))
    monkeypatch.setattr(journal_follower, "read_journal", read_late)
    node.follow()
    assert node.value("crashes_total", kind="error") == 2
    node.journal.write(Crashed(kind="error"))
    assert node.value("crashes_total", kind="error") == 3


def test_a_request_does_not_wait_for_storage_that_hangs(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It returns what is known; the rest follows when the storage answers."""
    answers, asked = threading.Event(), threading.Event()
    real = journal_follower.JournalTail.read

    def read(tail: Any) -> list[JournalEntry]:
        asked.set()
        answers.wait(60)
        return real(tail)

    node.follow()
    node.train(0, 5)
    monkeypatch.setattr(journal_follower.JournalTail, "read", read)
    node.journal.write(Crashed(kind="error"))
    assert (node.value("crashes_total", kind="error"), node.value("step")) == (0, 5)
    assert asked.is_set()
    answers.set()
    assert node.value("crashes_total", kind="error") == 1


def test_setting_the_clock_changes_no_durations(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.follow()
    node.journal.write(RunStarted())
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    node.journal.write(StateChanged(state="running", step=0))
    total = sum(value for _, value in node.exposed()["elastic_ckpt_time_seconds"])
    assert total < 600


def write(job: JobDirectory, events: list[JournalEntry]) -> None:
    path = job.journal("here")
    path.write_bytes(b"".join(encode_line(one) + b"\n" for one in events))


# -- Prometheus's conventions, and the page that lists them --------------------------------------


def full(tmp_path: Path) -> Node:
    """Return a node with a value for every metric."""
    node = Node(tmp_path)
    node.train(0, 3)
    node.board.rank_slot(0).metric("a\nb", 1.0)
    node.run.node.notice = NoticeRecord("aws", "spot", time.monotonic() + 100)
    node.run.node.last_recovery = RecoveryRecord(3, 4.0, {"load": 1.5}, 7, "disk")
    write(node.job, [event("start", time.time() - 9), saved(time.time(), 5)])
    node.follow()
    return node


def test_every_metric_is_exposed_with_its_labels(tmp_path: Path) -> None:
    node = full(tmp_path)
    families = {family.name: family for family in node.collector.collect()}
    for metric in METRICS:
        name = metric.name.removesuffix("_info" if metric.kind is Kind.INFO else "_total")
        family = families.pop(name)
        assert family.type == metric.kind.value
        for one in family.samples:
            assert set(one.labels) - {"le"} == {"job_name", *metric.labels}, metric.name
    assert not families
    described = [family.name for family in node.collector.describe()]
    assert described == [family.name for family in node.collector.collect()]


def test_the_openmetrics_format_can_be_parsed(tmp_path: Path) -> None:
    text = openmetrics.generate_latest(full(tmp_path).registry).decode()
    assert len(list(openmetrics_parser.text_string_to_metric_families(text))) == len(METRICS)


def test_no_label_clashes_with_prometheus_own() -> None:
    for metric in METRICS:
        assert not {"job", "instance", "le", "quantile"} & set(metric.labels)


@needs_promtool
def test_promtool_accepts_the_metrics(tmp_path: Path) -> None:
    text = generate_latest(full(tmp_path).registry)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def rows(page: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_lists_every_metric() -> None:
    of_node, of_job = DOCS.read_text().split("Of the whole job;")
    for page, wanted in ((of_node, False), (of_job, True)):
        listed = [row[:3] for row in rows(page) if "`elastic_ckpt_" in row[0]]
        assert listed == [
            [
                f"`{metric.name}`",
                metric.kind.value,
                ", ".join(f"`{label}`" for label in metric.labels),
            ]
            for metric in METRICS
            if metric.of_job is wanted
        ]


def test_the_page_lists_all_label_values() -> None:
    listed = {row[0].strip("`"): re.findall(r"`([^`]+)`", row[1]) for row in rows(DOCS.read_text())}
    assert listed["state"] == [state.value for state in RunState]
    assert listed["category"] == [category.value for category in Category]
    assert listed["cause"] == list(CAUSES)
    assert listed["kind"] == list(CRASHES)
    assert listed["reason"] == list(REASONS)
    assert listed["tier"] == list(TIERS)
    assert listed["stage"] == list(Breakdown().stages)


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@needs_promtool
def test_the_scrape_configuration_of_the_page_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "prometheus.yml"
    path.write_text(block("yaml"))
    subprocess.run(["promtool", "check", "config", path], check=True, capture_output=True)


@needs_promtool
def test_the_alerts_pass_their_own_tests() -> None:
    place = REPOSITORY / "scripts" / "prometheus"
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(["promtool", *command], cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_alerts_use_existing_metrics() -> None:
    text = (REPOSITORY / "scripts" / "prometheus" / "alerts.yml").read_text()
    asked = set(re.findall(r"elastic_ckpt_\w+", text + block("promql")))
    known = {metric.name for metric in METRICS}
    assert asked - known == {"elastic_ckpt_save_duration_seconds_bucket"}
    named = re.findall(r"alert: (\w+)", text)
    assert named == re.findall(r"^\| (ElasticCkpt\w+)", DOCS.read_text(), re.M)
