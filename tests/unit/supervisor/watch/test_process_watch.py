"""The processes of a job, as the kernel shows them: what is done, and what the user is told."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping

import pytest

from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Outcome
from elastic_ckpt.supervisor.agent.verdict import explain
from elastic_ckpt.supervisor.ports import Clock
from elastic_ckpt.supervisor.watch.process_watch import ProcessWatch

AGENT = 99


class Scene(Clock):
    """An agent and two ranks; the host and its clock."""

    def __init__(self) -> None:
        self.board = Board.private(2)
        for rank in range(2):
            self.board.rank_slot(rank).launched(rank, 100 + rank)
        self.now = 1000.0
        self.states: dict[int, str] = {}
        self.sent: list[tuple[int, int]] = []
        self.said: list[str] = []
        self.watch = ProcessWatch(self.board, self, self, self.said.append)

    def monotonic(self) -> float:
        return self.now

    def process_states(self, pids: Iterable[int]) -> Mapping[int, str]:
        return {pid: self.states.get(pid, "S") for pid in pids}

    def send(self, pid: int, number: int) -> None:
        self.sent.append((pid, number))

    def pass_by(self, seconds: int, *, urgent: bool = False) -> None:
        for _ in range(seconds):
            self.now += 1.0
            self.watch.poll(AGENT, urgent=urgent)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_stopped_worker_is_continued_and_then_killed_with_its_reason(scene: Scene) -> None:
    scene.states[101] = "T"
    scene.pass_by(7)
    assert scene.sent == [(101, signal.SIGCONT)]
    assert scene.said == [
        "rank 1 (pid 101) is stopped (SIGSTOP): continuing it, as the others wait for it"
    ]
    scene.pass_by(7)
    assert scene.sent[1:] == [(101, signal.SIGKILL)]
    slot = scene.board.read_slot(1)
    assert explain(slot, -9, None) == (-int(signal.SIGSTOP), "stopped again by SIGSTOP")
    assert scene.board.read_slot(0).outcome is Outcome.NONE


def test_a_zombie_is_killed_and_explained_by_its_end(scene: Scene) -> None:
    scene.states[101] = "Z"
    scene.pass_by(7)
    assert scene.sent == [(101, signal.SIGKILL)]
    assert scene.board.read_slot(1).outcome is Outcome.NONE


def test_a_worker_that_has_left_may_be_a_zombie(scene: Scene) -> None:
    scene.states[101] = "Z"
    scene.board.rank_slot(1).leave(Outcome.COMPLETED)
    scene.pass_by(30)
    assert scene.sent == []


def test_a_suspended_job_is_reported_once_and_left_alone(scene: Scene) -> None:
    scene.states = dict.fromkeys((AGENT, 100, 101), "T")
    scene.pass_by(100)
    assert scene.watch.suspended and scene.sent == []
    assert scene.said == ["the job is suspended from outside: waiting until it continues"]
    scene.states = {}
    scene.pass_by(1)
    assert not scene.watch.suspended


def test_workers_that_were_stopped_along_with_the_supervisor_have_time_to_continue(
    scene: Scene,
) -> None:
    scene.states = dict.fromkeys((100, 101), "T")
    scene.pass_by(2)
    scene.now += 3600.0
    scene.pass_by(4)
    assert scene.sent == []


def test_a_notice_continues_what_is_suspended(scene: Scene) -> None:
    scene.states = dict.fromkeys((AGENT, 100, 101), "T")
    scene.pass_by(2, urgent=True)
    assert sorted(scene.sent) == [(pid, signal.SIGCONT) for pid in (AGENT, 100, 101)]
