"""Many sources, one list of what matters."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ckpt.journal.journal import Journal, read_journal
from elastic_ckpt.notices import NoticeSource, Report
from elastic_ckpt.policy.deadline import EarlyWarning, Notice, SourceStatus, TimeLimit
from elastic_ckpt.supervisor.listener import SETTLE_SECONDS, Listener
from tests.checkpoints import open_job


class Source(NoticeSource):
    name = "cloud"
    settled = False

    def __init__(self) -> None:
        self.polled = 0
        self.report: Report = lambda word: None

    def start(self, report: Report) -> None:
        self.report = report

    def poll_now(self) -> None:
        self.polled += 1


class Signals(Source):
    name = "signal"
    pending = False

    def deliver(self) -> None:
        pass


class Scene:
    def __init__(self, directory: Path) -> None:
        self.job = open_job(directory / "job")
        self.signals, self.cloud, self.woken = Signals(), Source(), []
        self.listener = Listener(
            self.signals, [self.cloud], Journal(self.job, "here"), lambda: self.woken.append(1)
        )
        self.listener.start(100.0)

    def heard(self, now: float, lead: float = 10.0) -> list:
        return list(self.listener.take_in(now, lambda: lead))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_notices_and_warnings_come_in_order_and_the_rest_goes_to_the_journal(scene) -> None:
    notice, warning = Notice("cloud", "gone", 200.0), EarlyWarning("cloud", "maybe")
    for word in (SourceStatus("cloud", "does not answer"), warning, notice):
        scene.cloud.report(word)
    assert len(scene.woken) == 3
    assert scene.heard(100.0) == [warning, notice]
    assert scene.heard(101.0) == []
    assert [event.name for event in read_journal(scene.job)] == ["notice_source", "warning"]


def test_a_signal_makes_the_others_look_and_theirs_do_not(scene) -> None:
    scene.cloud.report(Notice("cloud", "gone", 200.0))
    scene.heard(100.0)
    assert scene.cloud.polled == 0
    scene.signals.report(Notice("signal", "SIGTERM", 200.0))
    scene.heard(100.0)
    assert scene.cloud.polled == 1


def test_a_limit_is_a_notice_once_the_time_is_short(scene) -> None:
    scene.cloud.report(TimeLimit("cloud", "time limit", 400.0))
    assert scene.heard(100.0) == []
    assert scene.heard(389.0) == []
    assert scene.heard(390.0) == [Notice("cloud", "time limit", 400.0)]
    assert scene.heard(391.0) == []


def test_a_limit_that_was_moved_counts_as_it_is_now(scene) -> None:
    scene.cloud.report(TimeLimit("cloud", "time limit", 400.0))
    scene.heard(100.0)
    scene.cloud.report(TimeLimit("cloud", "time limit", 900.0))
    assert scene.heard(390.0) == []
    assert scene.heard(895.0) == [Notice("cloud", "time limit", 900.0)]


def test_half_of_a_short_limit_is_for_training(scene) -> None:
    scene.cloud.report(TimeLimit("cloud", "time limit", 160.0))
    assert scene.heard(100.0, lead=500.0) == []
    assert scene.heard(129.0, lead=500.0) == []
    assert scene.heard(131.0, lead=500.0) == [Notice("cloud", "time limit", 160.0)]


def test_a_start_waits_for_first_answers_but_not_for_long(scene) -> None:
    assert not scene.listener.is_settled(100.0)
    assert scene.listener.is_settled(100.0 + SETTLE_SECONDS)
    scene.cloud.settled = True
    assert scene.listener.is_settled(100.0)


def test_a_deadline_that_is_far_away_is_a_warning_and_a_limit(scene) -> None:
    """Azure announces the maintenance of a host days ahead."""
    scene.cloud.report(Notice("cloud", "Redeploy", 100.0 + 3 * 86400.0))
    assert scene.heard(100.0) == [EarlyWarning("cloud", "Redeploy in 3 d")]
    assert scene.heard(100.0 + 2 * 86400.0) == []
    assert scene.heard(100.0 + 3 * 86400.0 - 5) == [
        Notice("cloud", "Redeploy", 100.0 + 3 * 86400.0)
    ]


def test_a_notice_that_was_not_taken_in_is_pending(scene) -> None:
    assert not scene.listener.pending
    scene.cloud.report(SourceStatus("cloud", "does not answer"))
    assert not scene.listener.pending
    scene.cloud.report(Notice("cloud", "gone", 200.0))
    assert scene.listener.pending
    scene.heard(100.0)
    assert not scene.listener.pending


@pytest.mark.parametrize("source", ["signal", "slurm"])
def test_who_waits_for_the_end_of_the_run_is_obeyed_however_much_time_there_is(
    scene, source: str
) -> None:
    """As with --grace 3600."""
    notice = Notice(source, "SIGTERM", 3700.0)
    scene.signals.report(notice)
    assert scene.heard(100.0) == [notice]
    assert scene.cloud.polled == (source == "signal")
