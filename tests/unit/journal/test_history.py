"""A job's history, its costs and curves, from journals short enough to follow by hand."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ckpt.journal.cost import Cost, costs
from elastic_ckpt.journal.curve import BINS, Steps, averaged, thin
from elastic_ckpt.journal.events import Unknown
from elastic_ckpt.journal.history import History
from elastic_ckpt.journal.history_types import Cause, NoticeKind
from elastic_ckpt.journal.line import KINDS, JournalEntry, event_data
from elastic_ckpt.journal.time_account import Category, total
from tests.journals import happened

pytestmark = pytest.mark.one_torch


def launch(wall: float, number: int) -> JournalEntry:
    return happened(wall, "launch", {"incarnation": number, "nproc": 2, "nodes": 1})


def running(wall: float, step: int) -> JournalEntry:
    return happened(wall, "state", {"state": "running", "step": step})


def loaded(wall: float, step: int, epoch: int = 0) -> JournalEntry:
    return happened(wall, "loaded", {"epoch": epoch, "step": step, "tier": "memory"})


def saved(wall: float, step: int, reason: str = "interval") -> JournalEntry:
    data = {"epoch": 0, "step": step, "reason": reason, "tier": "memory", "bytes": 100}
    return happened(wall, "saved", data)


def steps(wall: float, step: int, epoch: int = 0, **metrics: float) -> JournalEntry:
    data = {"step": step, "epoch": epoch, "samples_per_step": 4, "metrics": metrics}
    return happened(wall, "steps", data)


def ended(wall: float, kind: str) -> JournalEntry:
    return happened(wall, "ended", {"kind": kind, "rank": 1, "message": "it fell"})


def crash(wall: float, kind: str = "signal", **fields: Any) -> JournalEntry:
    return happened(wall, "crash", {"kind": kind, "rank": 1, "message": "it fell", **fields})


def end(wall: float, state: str, code: int | None) -> JournalEntry:
    return happened(wall, "end", {"state": state, "exit_code": code, "message": state})


def history_of(entries: list[JournalEntry], *, is_running: bool = False) -> History:
    history = History()
    for entry in entries:
        history.observe(entry)
    history.close(running=is_running)
    return history


def costs_of(history: History, now: float | None = None) -> list[Cost]:
    spans = history.account.spans(now)
    anew = Steps(history.samples, history.incarnations).restarts_count
    return costs(history.interruptions, history.incarnations, spans, restarts_count=anew)


CRASHED = [
    happened(0, "start", {"run_id": "r1", "script": "train.py"}),
    launch(1, 1), running(10, 0), steps(15, 5), saved(40, 30), steps(60, 50),
    ended(60, "crashed"), crash(60, tail=["Traceback", "OSError"]),
    launch(61, 2), loaded(69, 30), running(70, 30),
]  # fmt: skip


def test_empty_journal_has_no_history() -> None:
    history = history_of([])
    assert (history.first, history.last, history.is_supervised) == (None, None, False)
    assert costs_of(history) == []
    assert Steps([], []).curves() == [] and Steps([], []).rates() == []


def test_cost_of_a_crash() -> None:
    """Save at 40, crash at 60, training again at 70: 20 s and 20 steps lost, 10 s of recovery."""
    history = history_of(CRASHED, is_running=True)
    [one] = history.interruptions
    assert (one.cause, one.kind, one.rank, one.incarnation) == (Cause.FAILURE, "signal", 1, 1)
    assert one.tail == ("Traceback", "OSError") and one.at == 60
    first, second = history.incarnations
    assert (first.kind, first.reached_step, first.first_step_at) == ("crashed", 50, 10)
    assert (second.kind, second.ended, second.from_step, second.tier) == ("", None, 30, "memory")
    [cost] = costs_of(history, now=90)
    assert cost == Cost(20.0, 20, 10.0, 0.0, 70)


def test_cost_of_a_preemption() -> None:
    history = history_of([
        happened(0, "start"), launch(1, 1), running(10, 0), steps(48, 38),
        happened(50, "notice", {"source": "aws", "reason": "spot", "seconds": 120.0}),
        happened(50, "choice", {"kind": "full", "predicted_seconds": 2.0, "why": "it fits"}),
        saved(52, 42, "emergency"), ended(52, "stopped"),
        happened(53, "emergency_save", {"step": 42, "predicted_seconds": 2.0,
                                       "actual_seconds": 2.5}),
        end(54, "preempted", 75),
        happened(100, "start"), launch(102, 2), loaded(104, 42), running(105, 42),
    ], is_running=True)  # fmt: skip
    [notice] = history.notices
    assert (notice.kind, notice.grace, notice.why) == (NoticeKind.NOTICE, 120.0, "it fits")
    assert (notice.saved_step, notice.actual_seconds) == (42, 2.5)
    assert [run.exit_code for run in history.runs] == [75, None]
    [one] = history.interruptions
    assert (one.cause, one.kind, one.at) == (Cause.PREEMPTION, "aws", 52)
    [cost] = costs_of(history, now=110)
    assert cost == Cost(0.0, 0, 2.0 + 5.0, 46.0, 105)


def test_run_without_an_end_was_killed() -> None:
    entries = [*CRASHED[:6], happened(90, "start"), launch(91, 2), loaded(94, 30), running(95, 30)]
    history = history_of(entries, is_running=True)
    [one] = history.interruptions
    assert (one.cause, one.at) == (Cause.KILLED, 60)
    assert history.runs[0].killed and history.incarnations[0].kind == "killed"
    assert costs_of(history, now=100) == [Cost(20.0, 20, 5.0, 30.0, 95)]


def test_run_killed_after_its_notice_was_preempted() -> None:
    entries = [*CRASHED[:6], happened(61, "notice", {"source": "gcp"})]
    [one] = history_of(entries).interruptions
    assert (one.cause, one.kind) == (Cause.PREEMPTION, "gcp")


def test_running_run_is_not_killed() -> None:
    history = history_of(CRASHED[:6], is_running=True)
    assert history.interruptions == [] and history.runs[0].ended is None


def test_giving_up_after_a_crash_is_one_failure() -> None:
    """Giving up without a crash is a failure as well."""
    both = history_of([*CRASHED[:8], end(61, "failed", 70)])
    assert [one.cause for one in both.interruptions] == [Cause.FAILURE]
    alone = history_of([*CRASHED[:6], ended(61, "completed"), end(62, "failed", 70)])
    assert [(one.cause, one.message) for one in alone.interruptions] == [(Cause.GAVE_UP, "failed")]
    again = history_of([*CRASHED[:8], launch(62, 2), end(63, "failed", 70)])
    assert [one.cause for one in again.interruptions] == [Cause.FAILURE, Cause.GAVE_UP]


def test_leaving_without_a_notice_is_regrouping() -> None:
    history = history_of([
        *CRASHED[:6], ended(61, "stopped"), launch(62, 2), loaded(63, 30), running(64, 30),
    ], is_running=True)  # fmt: skip
    assert [one.cause for one in history.interruptions] == [Cause.REGROUPING]
    assert not history.interruptions[0].cause.is_failure


def test_two_failures_before_the_next_step_share_the_pause() -> None:
    """Crashes at 60 and, during recovery, at 65; the first one lost the work."""
    entries = [*CRASHED[:9], ended(65, "crashed"), crash(65), launch(66, 3), loaded(79, 30),
               running(80, 30)]  # fmt: skip
    first, second = costs_of(history_of(entries, is_running=True), now=90)
    assert first == Cost(20.0, 20, 5.0, 0.0, None)
    assert second == Cost(0.0, None, 15.0, 0.0, 80)


def test_work_lost_with_a_bad_checkpoint_belongs_to_the_failure_that_needed_it() -> None:
    """Saves at 20 and 40; crash at 45 and resumed from 40, crash at 60 and resumed from 20."""
    entries = [
        happened(0, "start"), launch(0, 1), running(0, 0), saved(20, 20), saved(40, 40),
        ended(45, "crashed"), crash(45), launch(45, 2), loaded(46, 40), running(47, 40),
        ended(60, "crashed"), crash(60),
        happened(61, "quarantined", {"path": "/a/epoch-0_step-40", "to": "/b/x", "reason": "bits"}),
        launch(61, 3), loaded(62, 20), running(63, 20),
    ]  # fmt: skip
    history = history_of(entries, is_running=True)
    first, second = costs_of(history, now=64)
    assert first.lost_seconds == 5.0 and second.lost_seconds == 20.0 + 13.0
    assert [one.reason for one in history.refused] == ["bits"]


def test_waiting_after_a_finished_job_belongs_to_no_interruption() -> None:
    history = history_of([
        happened(0, "start"), launch(0, 1), running(0, 0), ended(10, "completed"),
        end(11, "finished", 0), happened(50, "start"), launch(51, 2), ended(52, "completed"),
        end(53, "finished", 0),
    ])  # fmt: skip
    assert history.interruptions == []
    assert total(history.account.spans()).waiting_seconds == 39.0


def test_script_without_a_supervisor_has_incarnations_and_no_interruptions() -> None:
    history = history_of([
        happened(0, "script", {"world_size": 2}), saved(10, 5), happened(20, "script"),
        loaded(21, 5),
    ])  # fmt: skip
    assert not history.is_supervised and history.interruptions == []
    assert [one.kind for one in history.incarnations] == ["killed", "killed"]
    assert history.incarnations[1].from_step == 5


def test_only_notices_of_a_follower_count() -> None:
    entries = [*CRASHED[:6],
               happened(61, "notice", {"source": "aws", "follows": True}, node="node1"),
               happened(62, "crash", {"kind": "hang", "follows": True})]  # fmt: skip
    history = history_of(entries, is_running=True)
    assert history.interruptions == []
    assert [one.follows for one in history.notices] == [True]


def test_hang_has_the_stacks_of_each_rank() -> None:
    stacks = {"1": ["main (train.py:56)"], "0": ["backward"]}
    history = history_of([
        *CRASHED[:6], happened(61, "hang", {"rank": 1, "stacks": stacks}), ended(61, "crashed"),
        crash(61, "hang"), launch(62, 2), ended(63, "crashed"), crash(63),
    ])  # fmt: skip
    assert history.interruptions[0].stacks == ("rank 0: backward", "rank 1: main (train.py:56)")
    assert history.interruptions[1].stacks == ()


# -- curves --------------------------------------------------------------------------------------


def test_repeated_steps_are_in_the_curve_once() -> None:
    """Steps 10..50, back to 30, then 40 and 50 with other values."""
    entries = [*CRASHED[:3], steps(20, 10, loss=5.0), steps(30, 30, loss=4.0), saved(31, 30),
               steps(40, 40, loss=9.0), steps(50, 50, loss=9.5), ended(51, "crashed"), crash(51),
               launch(52, 2), loaded(53, 30), running(54, 30),
               steps(64, 40, loss=3.0), steps(74, 50, loss=2.5)]  # fmt: skip
    history = history_of(entries, is_running=True)
    [curve] = Steps(history.samples, history.incarnations).curves()
    assert curve.kept == [(10, 5.0), (30, 4.0), (40, 3.0), (50, 2.5)]
    assert curve.lost == [[(30, 4.0), (40, 9.0), (50, 9.5)]]
    assert (curve.name, curve.last, curve.count) == ("loss", 2.5, 6)


def test_epochs_that_restart_the_step_count_follow_each_other() -> None:
    entries = [*CRASHED[:3], steps(20, 5, 0, loss=3.0), steps(30, 10, 0, loss=2.0),
               steps(40, 4, 1, loss=1.0)]  # fmt: skip
    history = history_of(entries, is_running=True)
    found = Steps(history.samples, history.incarnations)
    assert found.restarts_count
    assert found.curves()[0].kept == [(5, 3.0), (10, 2.0), (14, 1.0)]


def test_rates_are_between_marks_of_one_incarnation() -> None:
    """10 steps of 4 samples in 10 s; nothing over the pause."""
    entries = [*CRASHED[:3], steps(20, 10), steps(30, 20), ended(31, "crashed"), crash(31),
               launch(32, 2), loaded(33, 20), running(34, 20), steps(44, 30), steps(49, 40),
               ]  # fmt: skip
    history = history_of(entries, is_running=True)
    found = Steps(history.samples, history.incarnations)
    assert found.unit == "samples"
    assert [(rate.began, rate.ended, rate.value) for rate in found.rates()] == [
        (20, 30, 4.0), (44, 49, 8.0),
    ]  # fmt: skip
    bins = averaged(found.rates(), 0, 300)
    assert [value for _, _, value in bins] == [4.0] * 10 + [8.0] * 5


def test_thinned_line_keeps_its_ends_and_extremes() -> None:
    line = [(float(x), math.sin(x)) for x in range(100_000)]
    line[50_003] = (50_003.0, 99.0)
    found = thin(line, 0, 99_999)
    assert len(found) <= 4 * (BINS + 1)
    assert found[0] == line[0] and found[-1] == line[-1] and (50_003.0, 99.0) in found
    assert [point[0] for point in found] == sorted(point[0] for point in found)


# -- anything at all ------------------------------------------------------------------------------

EVENTS = [*KINDS, "preload-harmful", "nothing-we-know"]
FIELDS = [
    "state", "kind", "step", "epoch", "incarnation", "nproc", "nodes", "reason", "source", "why",
    "seconds", "stall_seconds", "age_seconds", "samples_per_step", "metrics", "stages", "total",
    "rank", "exit_code", "message", "tail", "stacks", "path", "to", "intact", "how", "tier",
    "bytes", "error", "follows", "predicted_seconds", "actual_seconds", "present", "world_size",
]  # fmt: skip
WORDS = ["running", "finished", "preempted", "failed", "stopped", "crashed", "completed",
         "not-begun", "interval", "emergency", "<b>", "\x00\x1b[31m", "\ud800", "x" * 3000,
         ]  # fmt: skip

numbers = st.one_of(
    st.integers(-5, 200), st.sampled_from([-(10**400), 10**400, 2**63, -1.5, 0.1, 1e308, -1e308])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.sampled_from(WORDS)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from([*FIELDS, "loss", "load", "0"]), inner, max_size=4),
    ),
    max_leaves=8,
)
journals = st.lists(
    st.builds(
        happened,
        st.one_of(st.floats(0, 500), st.sampled_from([-1.0, 1e300, math.inf, math.nan, 2.5e11])),
        st.sampled_from(EVENTS),
        st.dictionaries(st.sampled_from(FIELDS), values, max_size=6),
        node=st.sampled_from(["here", "<i>", "\x00"]),
        incarnation=st.integers(-3, 9),
    ),
    max_size=40,
).map(lambda entries: sorted(entries, key=lambda entry: entry.wall))


@settings(max_examples=150)
@given(entries=journals, is_running=st.booleans())
def test_costs_of_any_journal_add_up(entries: list[JournalEntry], is_running: bool) -> None:
    history = history_of(entries, is_running=is_running)
    now = 3e11 if is_running else None
    spans = history.account.spans(now)
    goodput = total(spans)
    found = costs_of(history, now)
    slack = 1e-4 * max(1.0, goodput.wall_seconds)
    if found:
        lost = sum(cost.lost_seconds for cost in found)
        assert lost == pytest.approx(goodput.lost_work_seconds, abs=slack)
    for category in (Category.RECOVERY, Category.WAITING):
        own = sum(getattr(cost, f"{category.value}_seconds") for cost in found)
        assert own <= goodput.seconds(category) + slack
    assert all(cost.seconds >= 0 for cost in found)
    for curve in Steps(history.samples, history.incarnations).curves():
        for point in (point for line in (curve.kept, *curve.lost) for point in line):
            assert math.isfinite(point[0]) and math.isfinite(point[1])
    if not is_running:
        assert all(one.ended is not None for one in [*history.runs, *history.incarnations])


@given(name=st.sampled_from(EVENTS), value=values, step=st.integers(0, 9))
def test_fields_of_any_event_have_their_types(name: str, value: Any, step: int) -> None:
    data = dict.fromkeys(FIELDS, value)
    for fields in (data, {**data, "step": step, "total": 1.0}):
        event = happened(0.0, name, fields).event
        if not isinstance(event, Unknown):
            assert msgspec.convert(event_data(event), type(event)) == event
