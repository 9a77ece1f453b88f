"""What counts as a failure, in journals short enough to count by hand."""

from __future__ import annotations

import pytest

from elastic_ckpt.journal.failure_rate import FailureHistory
from elastic_ckpt.journal.line import JournalEntry
from tests.journals import happened

START, NOTICE = happened(0, "start"), happened(50, "notice")
RUNNING = happened(10, "state", {"state": "running"})


def saved(wall: float) -> JournalEntry:
    return happened(wall, "saved", {"step": 1, "reason": "emergency"})


def ended(wall: float, kind: str) -> JournalEntry:
    return happened(wall, "ended", {"kind": kind})


def end(wall: float, code: int | None) -> JournalEntry:
    return happened(wall, "end", {"exit_code": code})


@pytest.mark.parametrize(
    ("entries", "failures", "seconds"),
    [
        pytest.param([], 0, 0.0, id="an empty journal"),
        pytest.param([START, ended(20, "crashed"), end(20, 70)], 0, 0.0, id="it never trained"),
        pytest.param(
            [START, RUNNING, ended(100, "completed"), end(101, 0)], 0, 90.0, id="it finished"
        ),
        pytest.param(
            [START, RUNNING, ended(60, "crashed"), happened(60, "crash")], 1, 50.0, id="a crash"
        ),
        pytest.param([START, RUNNING, happened(60, "crash")], 1, 50.0, id="the agent died"),
        pytest.param(
            [START, RUNNING, NOTICE, saved(55), ended(56, "stopped"), end(57, 75)], 0, 46.0,
            id="a preemption that was saved",
        ),
        pytest.param(
            [START, RUNNING, NOTICE, ended(56, "stopped"), end(57, 76)], 1, 46.0,
            id="a preemption without a save",
        ),
        pytest.param([START, RUNNING, NOTICE, end(80, 76)], 1, 70.0, id="the deadline came"),
        pytest.param(
            [START, RUNNING, NOTICE, saved(55), ended(56, "crashed"), end(57, 75)], 0, 46.0,
            id="a crash after the emergency save",
        ),
        pytest.param(
            [START, NOTICE, end(51, 76)], 0, 0.0, id="a notice before the first step",
        ),
        pytest.param(
            [START, RUNNING, ended(40, "crashed"), happened(40, "crash"), NOTICE, end(51, 76)], 1,
            30.0, id="a notice between two incarnations",
        ),
        pytest.param(
            [START, RUNNING, saved(40), happened(1000, "start")], 1, 30.0, id="gone without notice"
        ),
        pytest.param(
            [START, RUNNING, NOTICE, saved(55), happened(1000, "start")], 0, 45.0,
            id="gone during the notice, after the save",
        ),
        pytest.param(
            [START, RUNNING, NOTICE, happened(1000, "start")], 1, 40.0,
            id="gone during the notice, before the save",
        ),
        pytest.param(
            [START, RUNNING, saved(40), NOTICE, happened(1000, "start")], 1, 40.0,
            id="a save before the notice does not hold what came after it",
        ),
    ],
)  # fmt: skip
def test_counted_failures(entries: list[JournalEntry], failures: int, seconds: float) -> None:
    history = FailureHistory()
    for entry in entries:
        history.observe(entry)
    assert (history.failures, history.trained_seconds(now=2000.0)) == (failures, seconds)


def test_running_incarnation_counts_up_to_now() -> None:
    history = FailureHistory()
    for entry in (START, RUNNING):
        history.observe(entry)
    assert history.trained_seconds(now=70.0) == 60.0
    assert history.trained_seconds(now=5.0) == 0.0  # the clock was set back


def test_time_in_the_queue_is_not_training_time() -> None:
    history = FailureHistory()
    entries = [START, RUNNING, NOTICE, saved(55), ended(56, "stopped"), end(57, 75),
               happened(9000, "start"), happened(9010, "state", {"state": "running"}),
               ended(9030, "crashed"), happened(9030, "crash")]  # fmt: skip
    for entry in entries:
        history.observe(entry)
    assert (history.failures, history.trained_seconds(now=9999.0)) == (1, 46.0 + 20.0)
