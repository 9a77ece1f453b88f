"""A watch over the board: what is silence, and what was only not looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.hang import PACE_SILENCES, Effort, Hang
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Phase
from elastic_ckpt.supervisor.ports import Clock
from elastic_ckpt.supervisor.watch.hang_watch import HangWatch
from elastic_ckpt.supervisor.watch.stacks import Stack
from tests.checkpoints import open_job

SECOND = 10**9


class Host:
    """Runs what takes long at once, and sees no stack."""

    def __init__(self) -> None:
        self.does = Effort.IDLE
        self.stack = Stack()

    def effort(self, pids: Iterable[int]) -> Effort:
        return self.does

    def aside(self, work: Callable[[], None]) -> None:
        work()

    def stacks(self, pids: Mapping[int, int]) -> Mapping[int, Stack]:
        return dict.fromkeys(pids, self.stack)


class Scene(Clock):
    """A rank that has finished a step and is silent from now on, and a clock that a test moves."""

    def __init__(self, directory: Path) -> None:
        self.board = Board.private()
        slot = self.slot = self.board.rank_slot(0)
        slot.launched(0, 1)
        slot.attach(0)
        slot.phase(Phase.TRAINING)
        slot.step(2, 1, 0, 0)
        self.now = time.monotonic_ns()
        journal = Journal(open_job(directory / "job"), "here")
        self.host = Host()
        self.watch = HangWatch(self.board, journal, 60.0, self.host, self)
        self.watch.begin()
        self.watch.detector.seen["training"] = PACE_SILENCES

    def monotonic_ns(self) -> int:
        return self.now

    def pass_by(self, seconds: int) -> bool:
        """Poll each second; return whether a hang was found."""
        found = []
        for _ in range(seconds):
            self.now += SECOND
            found.append(self.watch.poll())
        return any(one is not None for one in found)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_silence_beyond_the_limit_is_a_hang(scene: Scene) -> None:
    assert not scene.pass_by(59)
    assert scene.pass_by(3)


@pytest.mark.parametrize(
    ("stack", "line", "stacks"),
    [
        (Stack(("recv (/usr/site-packages/x.py:1)", "get (train.py:7)")), "get (train.py:7)",
         "; elastic-ckpt report shows each rank's stack"),
        (Stack(why="no stack: py-spy is missing"), "", "; no stack: py-spy is missing"),
    ],
)  # fmt: skip
def test_a_stack_that_cannot_be_read_is_no_place_in_the_script(
    scene: Scene, stack: Stack, line: str, stacks: str
) -> None:
    scene.host.stack = stack
    scene.pass_by(59)
    [found] = [found for _ in range(3) if (scene.pass_by(1), found := scene.watch.poll())[1]]
    assert found.lines.get(0, "") == line
    assert Hang.of([found]).stacks == stacks


def test_a_job_that_was_suspended_with_its_supervisor_has_its_time_again(scene: Scene) -> None:
    """SLURM suspends a job like this: all processes are stopped, none can beat."""
    assert not scene.pass_by(50)
    scene.now += 3600 * SECOND
    assert not scene.pass_by(59)
    assert scene.pass_by(4)


@pytest.mark.parametrize("seconds", [3, 3600])
def test_a_job_that_is_suspended_while_its_supervisor_runs_has_its_time_again(
    scene: Scene, seconds: int
) -> None:
    assert not scene.pass_by(50)
    for _ in range(seconds):
        scene.watch.excuse()
        assert not scene.pass_by(1)
    assert not scene.pass_by(58)
    assert scene.pass_by(4)


def test_a_machine_that_slept_has_lost_no_time(scene: Scene) -> None:
    """The monotonic clock stands still meanwhile; only that of the wall goes on."""
    assert not scene.pass_by(59)
    assert scene.pass_by(3)


@pytest.mark.parametrize(
    "phase", [Phase.SAVING, Phase.EVALUATING, Phase.BETWEEN, Phase.LOADING, Phase.LAUNCHED]
)
def test_a_slow_disk_an_evaluation_or_the_script_is_no_hang(scene: Scene, phase: Phase) -> None:
    scene.slot.phase(phase)
    assert not scene.pass_by(1800)


def test_data_that_come_slowly_are_no_hang(scene: Scene) -> None:
    scene.watch.detector.seen["fetching"] = PACE_SILENCES
    scene.slot.phase(Phase.FETCHING)
    assert not scene.pass_by(290)
    assert scene.pass_by(20)


def test_the_first_step_compiles(scene: Scene) -> None:
    scene.slot.attach(1)
    scene.slot.step(2, 1, 0, 0)
    assert not scene.pass_by(1800)


@pytest.mark.parametrize(("effort", "seconds"), [(Effort.SPINNING, 300), (Effort.WORKING, 1800)])
def test_a_later_step_that_compiles_or_evaluates_is_no_hang(
    scene: Scene, effort: Effort, seconds: int
) -> None:
    scene.host.does = effort
    assert not scene.pass_by(seconds - 1)
    assert scene.pass_by(3)


def test_workers_that_stop_working_hang_within_seconds(scene: Scene) -> None:
    scene.host.does = Effort.WORKING
    assert not scene.pass_by(200)
    scene.host.does = Effort.IDLE
    assert scene.pass_by(20)


def test_what_was_seen_in_one_silence_says_nothing_of_the_next(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[Callable[[], None]] = []
    monkeypatch.setattr(scene.host, "aside", late.append)
    assert not scene.pass_by(65)
    monkeypatch.setattr(time, "monotonic_ns", lambda: scene.now)
    scene.slot.step(3, 2, 0, 0)
    scene.pass_by(1)
    late[0]()  # it was idle then
    scene.host.does = Effort.WORKING
    monkeypatch.undo()
    assert not scene.pass_by(600)


def test_suspended_time_is_not_learned(scene: Scene) -> None:
    scene.pass_by(2)
    scene.now += 3600 * SECOND
    scene.pass_by(2)
    scene.slot.step(3, 2, 0, 0)
    scene.pass_by(1)
    assert 0 < scene.watch.detector.longest["training"] < 10


def test_full_step_is_learned_between_rare_polls(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of half a second, each looked at a quarter of a second after it began."""
    monkeypatch.setattr(time, "monotonic_ns", lambda: scene.now)
    scene.slot.step(3, 2, 0, 0)
    for step in range(4, 7):
        scene.now += SECOND // 4
        scene.watch.poll()
        scene.now += SECOND // 4
        scene.slot.step(step, step - 1, 0, 0)
        scene.watch.poll()
    assert scene.watch.detector.longest["training"] == 0.5
