"""The account of a job's time, in journals short enough to add up by hand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.journal.time_account import SUPERVISED, Category, Goodput, TimeAccount
from tests.journals import happened

pytestmark = pytest.mark.one_torch


def observed(entries: list[JournalEntry]) -> TimeAccount:
    found = TimeAccount()
    for entry in entries:
        found.observe(entry)
    return found


def account(entries: list[JournalEntry], now: float | None = None) -> Goodput:
    return observed(entries).goodput(now)


def state(wall: float, name: str) -> JournalEntry:
    return happened(wall, "state", {"state": name})


def running(wall: float) -> JournalEntry:
    return state(wall, "running")


def began(wall: float) -> list[JournalEntry]:
    """A run that starts at 0 and trains from ``wall`` on."""
    return [happened(0, "start"), running(wall)]


def loaded(wall: float, step: int) -> JournalEntry:
    return happened(wall, "loaded", {"epoch": 0, "step": step})


def saved(wall: float, step: int, stall: float = 0.0, seconds: float = 0.0) -> JournalEntry:
    data = {"epoch": 0, "step": step, "stall_seconds": stall, "seconds": seconds or stall}
    return happened(wall, "saved", data)


def resumed(wall: float, step: int) -> list[JournalEntry]:
    return [loaded(wall - 0.5, step), running(wall)]


def steps(wall: float, step: int) -> JournalEntry:
    return happened(wall, "steps", {"step": step})


def ended(wall: float, kind: str) -> JournalEntry:
    return happened(wall, "ended", {"kind": kind})


def end(wall: float, exit_code: int = 0) -> JournalEntry:
    return happened(wall, "end", {"exit_code": exit_code})


def of(entries: list[JournalEntry], now: float | None = None) -> dict[str, float]:
    """The categories that have any time."""
    found = account(entries, now)
    return {one.value: found.seconds(one) for one in Category if found.seconds(one)}


def test_empty_journal_has_no_time() -> None:
    assert account([]) == Goodput(*[0.0] * 7)
    assert account([], now=100.0).fraction is None


def test_job_that_never_trained() -> None:
    entries = [happened(10, "start"), happened(12, "launch"), ended(20, "crashed"), end(20, 70)]
    assert of(entries) == {"setup": 10.0}
    assert account(entries).fraction == 0.0


def test_undisturbed_run() -> None:
    """10 s to start, 90 s of training, 2 + 3 of them in saves, 1 s to end."""
    entries = [
        *began(10), saved(40, 30, 2.0), saved(70, 60, 3.0), ended(100, "completed"), end(101),
    ]  # fmt: skip
    assert of(entries) == {"training": 85.0, "stall": 5.0, "setup": 11.0}
    assert account(entries).fraction == pytest.approx(85 / 101)


def test_crash_loses_training_after_the_last_save() -> None:
    """10..60 with a save at 40 and 1 s of stall, so 29 s count; back at 70, then 40 s more."""
    entries = [
        *began(10), saved(40, 30, 1.0), ended(60, "crashed"), happened(60, "crash"),
        state(60, "backing-off"), state(65, "starting"), *resumed(70, 30), ended(110, "completed"),
        end(110),
    ]  # fmt: skip
    expected = {"training": 69.0, "stall": 1.0, "lost_work": 20.0, "recovery": 10.0, "setup": 10.0}
    assert of(entries) == expected


def test_crash_before_any_save_loses_everything_since_the_first_step() -> None:
    entries = [*began(10), ended(30, "crashed")]
    assert of(entries) == {"lost_work": 20.0, "setup": 10.0}
    again = [*entries, happened(35, "state", {"state": "running", "step": 0})]
    assert of(again, now=45.0) == {
        "lost_work": 20.0, "setup": 10.0, "recovery": 5.0, "training": 10.0,
    }  # fmt: skip


def test_second_crash_loses_its_incarnation() -> None:
    entries = [
        *began(10), saved(20, 10), ended(25, "crashed"), *resumed(40, 10), ended(47, "crashed"),
    ]  # fmt: skip
    assert of(entries)["lost_work"] == 5.0 + 7.0
    assert of(entries)["training"] == 10.0


def test_resuming_from_an_older_checkpoint_loses_what_the_newer_one_held() -> None:
    """Saves at 20 and 30; the one at 30 is bad, and training resumes from 20."""
    entries = [*began(0), saved(20, 20), saved(30, 30), ended(35, "crashed"), *resumed(40, 20)]
    assert of(entries, now=41.0) == {
        "training": 20.0 + 1.0, "lost_work": 15.0, "recovery": 5.0,
    }  # fmt: skip


def test_restart_from_scratch_loses_everything() -> None:
    """The checkpoints were deleted, as the first step of the new incarnation shows."""
    from_scratch = happened(50, "state", {"state": "running", "step": 0})
    entries = [*began(0), saved(20, 20), ended(40, "crashed"), from_scratch]
    assert of(entries, now=51.0) == {"lost_work": 40.0, "recovery": 10.0, "training": 1.0}


def test_script_that_loads_by_itself_is_assumed_to_resume_from_the_newest() -> None:
    """The journal has neither what it loaded nor its first step."""
    entries = [*began(0), saved(20, 20), ended(40, "crashed"), running(50)]
    assert of(entries, now=51.0)["lost_work"] == 20.0


def test_training_during_a_copy_is_not_in_the_checkpoint() -> None:
    """A save of 10 s with a stall of 1 s: its state is that of 30 s."""
    entries = [
        *began(0),
        saved(40, 30, stall=1.0, seconds=10.0),
        ended(50, "crashed"),
        *resumed(60, 30),
    ]
    assert of(entries, now=60.0) == {
        "training": 30.0, "stall": 1.0, "lost_work": 19.0, "recovery": 10.0,
    }  # fmt: skip


def test_preemption_loses_nothing_and_time_in_the_queue_is_waiting() -> None:
    """46 s with 5 s of stall, a night in the queue, 40 s more."""
    entries = [
        *began(10), happened(50, "notice"), state(50, "draining"), saved(55, 40, 5.0),
        ended(56, "stopped"), state(56, "preempted"), end(57, 75), happened(1000, "start"),
        *resumed(1010, 40),
    ]  # fmt: skip
    assert of(entries, now=1050.0) == {
        "training": 40.0 + 40.0, "stall": 5.0, "setup": 10.0, "recovery": 2.0 + 10.0,
        "waiting": 943.0,
    }  # fmt: skip
    assert account(entries).wall_seconds == 1010.0


def test_save_before_the_first_step_stalls_no_training() -> None:
    entries = [happened(0, "start"), saved(5, 0, 4.0), running(10)]
    assert of(entries, now=20.0) == {"setup": 10.0, "training": 10.0}


def test_killed_supervisor_trained_until_its_last_entry() -> None:
    """The restart resumes from step 30, so the steps after it are lost."""
    entries = [
        *began(10), saved(40, 30), steps(60, 50), happened(1000, "start"), *resumed(1010, 30),
        ended(1110, "completed"), end(1110),
    ]  # fmt: skip
    assert of(entries) == {
        "setup": 10.0, "training": 30.0 + 100.0, "lost_work": 20.0, "waiting": 940.0,
        "recovery": 10.0,
    }  # fmt: skip
    assert of(entries[:4]) == {"setup": 10.0, "training": 30.0, "lost_work": 20.0}
    assert of(entries[:4], now=70.0) == {"setup": 10.0, "training": 60.0}


def test_journal_without_its_start_starts_within_the_training() -> None:
    """Old files are deleted. A remaining save does not show that a supervisor ran; a mark does."""
    entries = [saved(10, 10, 1.0), steps(20, 20), steps(50, 50), ended(60, "completed"), end(60)]
    assert of(entries) == {"training": 40.0}


def test_script_without_a_supervisor_has_no_account() -> None:
    entries = [happened(0, "script"), saved(10, 10, 1.0), saved(20, 20, 1.0)]
    assert account(entries) == Goodput(*[0.0] * 7)


def test_dead_agent_ends_its_incarnation() -> None:
    """The supervisor itself writes the crash, as the agent cannot report the end."""
    entries = [
        *began(10), saved(40, 30), happened(50, "crash"), state(50, "backing-off"),
        *resumed(60, 30), ended(100, "completed"), end(100),
    ]  # fmt: skip
    assert of(entries) == {"setup": 10.0, "training": 70.0, "lost_work": 10.0, "recovery": 10.0}


def test_incarnation_cut_off_at_the_deadline_loses_unsaved_work() -> None:
    entries = [
        *began(10), saved(40, 30), state(50, "draining"), state(60, "preempted"), end(60, 76),
    ]  # fmt: skip
    assert of(entries) == {"setup": 10.0, "training": 30.0, "lost_work": 20.0}


def test_waiting_for_nodes_is_not_recovery() -> None:
    """Two of three nodes remain at 50; the third returns at 90."""
    entries = [
        *began(10), saved(40, 30), ended(50, "crashed"), happened(52, "waiting"),
        happened(90, "launch"), *resumed(95, 30),
    ]  # fmt: skip
    assert of(entries, now=100.0) == {
        "setup": 10.0, "training": 35.0, "lost_work": 10.0, "recovery": 2.0 + 5.0, "waiting": 38.0,
    }  # fmt: skip


def test_resize_costs_recovery_and_no_work() -> None:
    entries = [*began(10), saved(40, 30, 1.0), ended(40, "stopped"), *resumed(44, 30)]
    assert of(entries, now=50.0) == {
        "setup": 10.0, "training": 35.0, "stall": 1.0, "recovery": 4.0,
    }  # fmt: skip


def test_entries_of_a_follower_do_not_count() -> None:
    entries = [*began(10), happened(20, "crash", {"follows": True})]
    assert of(entries, now=30.0) == {"setup": 10.0, "training": 20.0}


_KINDS = ["completed", "stopped", "not-begun", "crashed", "cut-short", 7, None]
_entries = st.builds(
    happened,
    st.floats(0, 1000),
    st.sampled_from(
        ["start", "state", "saved", "loaded", "save_failed", "steps", "waiting", "held", "launch",
         "ended", "crash", "end", "notice", "anything"]
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "state": st.sampled_from(["running", "draining", "starting"]),
            "step": st.one_of(st.integers(-5, 50), st.none(), st.text(max_size=2)),
            "epoch": st.integers(0, 2),
            "seconds": st.one_of(st.floats(-5, 2000), st.text(max_size=2)),
            "stall_seconds": st.one_of(st.floats(-5, 2000), st.none()),
            "kind": st.sampled_from(_KINDS),
            "exit_code": st.sampled_from([0, 75, 76, None]),
            "follows": st.just(True),
        },
    ),
)  # fmt: skip


@settings(max_examples=400)
@given(st.lists(_entries, max_size=30), st.one_of(st.none(), st.floats(0, 2000)))
def test_every_second_counts_once(entries: list[JournalEntry], now: float | None) -> None:
    """Spans have no gaps, and the categories add up to the time, for any journal."""
    entries.sort(key=lambda entry: entry.wall)
    found = observed(entries)
    spans = found.spans(now)
    leading = [entry for entry in entries if not entry.event.follows]
    counted = itertools.dropwhile(lambda entry: not isinstance(entry.event, SUPERVISED), leading)
    own = [entry.wall for entry in counted]
    lasted = max(own[-1], now or 0.0) - own[0] if own else 0.0
    assert sum(span.seconds for span in spans) == pytest.approx(lasted, abs=1e-6)
    assert all(span.seconds >= 0 for span in spans)
    assert all(one.ended == two.began for one, two in itertools.pairwise(spans))
    result = found.goodput(now)
    assert sum(result.seconds(one) for one in Category) == pytest.approx(result.wall_seconds)
    assert result.wall_seconds == pytest.approx(lasted, abs=1e-6)
