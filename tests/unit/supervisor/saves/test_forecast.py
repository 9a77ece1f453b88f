"""What the supervisor predicts of an emergency save, and how it is compared with what came."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.prediction_file import read_predictor, write_predictor
from elastic_ckpt.journal.journal import Journal, read_journal
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.policy.emergency import ChoiceKind
from elastic_ckpt.policy.prediction import FIRST_MARGIN, Predictor, Route
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Slot
from elastic_ckpt.supervisor.saves.forecast import SaveForecast
from tests.journals import happened

GB = 10**9


class Predictions:
    """The part of the job directory that a forecast uses, without the thread."""

    def __init__(self, job: JobDirectory) -> None:
        self.job = job

    def read_predictor(self) -> Predictor:
        return read_predictor(self.job)

    def write_predictor(self, predictor: Predictor) -> None:
        write_predictor(self.job, predictor)


@pytest.fixture
def forecast(job: JobDirectory) -> SaveForecast:
    return SaveForecast(Predictions(job), Journal(job, "here"))


def event(name: str, at: float = 0.0, **data: Any) -> JournalEntry:
    return happened(1e9 + at, name, data, monotonic=at, node="here")


def saved(seconds: float, tier: str = "disk", at: float = 0.0, **data: Any) -> JournalEntry:
    return event("saved", at, **{"step": 1} | data, tier=tier, bytes=GB, seconds=seconds)


def drained(seconds: float, at: float = 0.0, **data: Any) -> JournalEntry:
    return event("drained", at, bytes=GB, seconds=seconds, **data)


def slot(**changes: Any) -> Slot:
    """A rank that resumed at step 10, began at 100 s, and began step 21 at 120 s: 2 s a step."""
    board = Board.private()
    found = board.read_slot(0)
    known = {"start_step": 10, "finished": 20, "first_entry": 100 * GB, "beat": 120 * GB}
    return Slot(**{**found.__dict__, **known, **changes})


def notice(forecast: SaveForecast, at: float, slots: Iterable[Slot] = ()) -> None:
    forecast.noticed(forecast.outlook(30.0, slots, at, None), at)


def compared(job: JobDirectory) -> list[dict[str, Any]]:
    return [each.data for each in read_journal(job) if each.name == "emergency_save"]


@pytest.mark.parametrize(
    ("told", "route"),
    [
        (saved(2.0, "disk"), Route.DISK),
        (saved(2.0, "memory"), Route.MEMORY),
        (drained(2.0), Route.DRAIN),
    ],
)
def test_each_tier_is_measured_by_its_own_events(
    forecast: SaveForecast, told: JournalEntry, route: Route
) -> None:
    forecast.learn(told)
    assert list(forecast.predictor.routes) == [route]
    assert forecast.predictor.expect(route, GB) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "told",
    [
        event("launch"),
        event("saved", step=1),
        saved(2.0, "tape"),
        event("saved", step=1, tier=["disk"]),
        event("saved", step=1, tier="disk", bytes="x", seconds=1.0),
        event("drained", tier="disk", bytes=GB),
        event("saved", step=1, tier="disk", bytes=float("inf"), seconds=1.0),
    ],
)
def test_what_tells_of_no_save_teaches_nothing(forecast: SaveForecast, told: JournalEntry) -> None:
    forecast.learn(told)
    assert forecast.predictor.routes == {}


def test_the_next_run_predicts_from_what_this_one_learned(
    job: JobDirectory, forecast: SaveForecast
) -> None:
    forecast.learn(saved(2.0))
    forecast.keep()
    again = SaveForecast(Predictions(job), Journal(job, "here"))
    notice(again, 0.0)
    again.learn(saved(2.5, at=2.7, reason="emergency", step=7))
    [found] = compared(job)
    assert found == {
        "step": 7, "predicted_seconds": pytest.approx(2.0 * FIRST_MARGIN), "actual_seconds": 2.7,
    }  # fmt: skip


def test_nothing_is_written_where_nothing_was_learned(
    job: JobDirectory, forecast: SaveForecast
) -> None:
    forecast.learn(event("launch"))
    forecast.keep()
    assert not job.prediction.exists()


@pytest.mark.parametrize(
    ("slots", "rest"),
    [
        ([], 0.0),
        ([slot()], 1.5),  # half a second of two is over
        ([slot(), slot(beat=119 * GB, first_entry=99 * GB)], 1.5),  # the slowest rank counts
        ([slot(beat=110 * GB)], 1.0),  # 1 s a step; this one takes longer than usual
        ([slot(finished=10)], 0.0),  # no step is done yet
        ([slot(first_entry=0)], 0.0),
    ],
)
def test_the_rest_of_the_step_is_taken_from_the_board(
    forecast: SaveForecast, slots: list[Slot], rest: float
) -> None:
    assert forecast.outlook(30.0, slots, 120.5, None).rest_of_step == pytest.approx(rest)


def test_a_save_straight_to_the_disk_is_compared_from_the_notice_to_its_seal(
    job: JobDirectory, forecast: SaveForecast
) -> None:
    forecast.learn(saved(2.0, at=50.0))
    notice(forecast, 120.5, [slot()])
    notice(forecast, 125.0)  # a second one changes nothing
    forecast.learn(saved(2.2, at=123.5, reason="emergency", step=20))
    [found] = compared(job)
    assert found["predicted_seconds"] == pytest.approx(1.5 + 2.0 * FIRST_MARGIN)
    assert found["actual_seconds"] == 3.0


def test_the_drain_of_an_earlier_snapshot_is_no_emergency_save(
    job: JobDirectory, forecast: SaveForecast
) -> None:
    forecast.learn(saved(0.5, "memory", step=5))
    notice(forecast, 100.0)
    forecast.learn(drained(4.0, at=102.0, step=5))
    assert compared(job) == []
    forecast.learn(saved(3.0, at=104.0, reason="emergency", step=9))
    [found] = compared(job)
    assert found["actual_seconds"] == 4.0


def test_first_save_has_no_prediction_and_is_journaled(
    job: JobDirectory, forecast: SaveForecast
) -> None:
    notice(forecast, 10.0)
    forecast.learn(saved(2.0, at=13.0, reason="emergency", step=1))
    assert compared(job) == [{"step": 1, "predicted_seconds": None, "actual_seconds": 3.0}]


def test_a_save_on_the_interval_is_no_emergency(job: JobDirectory, forecast: SaveForecast) -> None:
    notice(forecast, 10.0)
    forecast.learn(saved(2.0, at=13.0, reason="interval", step=1))
    assert compared(job) == []


def test_the_fastest_replica_shows_what_one_takes_that_a_node_waits_for(
    forecast: SaveForecast,
) -> None:
    """The others were made at the lowest priority, beside training."""
    forecast.learn(saved(1.0, tier="memory"))
    forecast.learn(drained(20.0))
    assert forecast.of_a_node_that_leaves(2, 60.0).kind is ChoiceKind.FULL  # no replica was made
    for size, seconds, expected in (
        (800, 0.1, 3.0),  # as a piece of 16 MiB
        (GB // 2, 30.0, 30.0),
        (GB // 2, 2.0, 2.0),
        (GB // 2, 9.0, 2.0),
        (800, 0.001, 2.0),
    ):
        forecast.learn(event("replicated", bytes=size, seconds=seconds))
        expected = pytest.approx(expected, rel=0.01)
        assert forecast.predictor.expect(Route.PEER, GB // 2) == expected
    assert forecast.predictor.last_bytes == GB
    choice = forecast.of_a_node_that_leaves(2, 60.0)
    assert choice.kind is ChoiceKind.PEER
    assert choice.predicted_seconds == pytest.approx(FIRST_MARGIN * 3.0)
