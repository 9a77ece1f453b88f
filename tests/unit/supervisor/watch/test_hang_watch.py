"""A watch over the board: what is silence, and what was only not looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Phase
from elastic_ckpt.supervisor.ports import Clock
from elastic_ckpt.supervisor.watch.hang_watch import HangWatch
from elastic_ckpt.supervisor.watch.stacks import Stack
from tests.checkpoints import open_job

SECOND = 10**9


class Host:
    """Runs what takes long at once, and sees no stack."""

    def aside(self, work: Callable[[], None]) -> None:
        work()

    def stacks(self, pids: Mapping[int, int]) -> Mapping[int, Stack]:
        return {rank: Stack(()) for rank in pids}


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
        self.watch = HangWatch(self.board, journal, 60.0, Host(), self)
        self.watch.begin()

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


def test_a_job_that_was_suspended_with_its_supervisor_has_its_time_again(scene: Scene) -> None:
    """SLURM suspends a job like this: all processes are stopped, none can beat."""
    assert not scene.pass_by(50)
    scene.now += 3600 * SECOND
    assert not scene.pass_by(59)
    assert scene.pass_by(4)


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
