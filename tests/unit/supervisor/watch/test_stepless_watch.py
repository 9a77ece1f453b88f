"""No Session, or one that is open and shows no step, is a warning after a minute."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elastic_ckpt.jobdir.node_record import NodeRecord, ProcessIdentity
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.ended import Ended, EndKind
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.protocol.slot import Outcome, Phase, SlotWriter, Source
from elastic_ckpt.supervisor.ports import Clock
from elastic_ckpt.supervisor.run_record import RunRecord
from elastic_ckpt.supervisor.watch.stepless_watch import SteplessWatch


class Scene(Clock):
    """Two ranks whose Sessions have just opened."""

    def __init__(self, job: JobDirectory) -> None:
        self.board = Board.private(2)
        self.slots = [self.board.rank_slot(rank) for rank in range(2)]
        for rank, slot in enumerate(self.slots):
            slot.launched(rank, 100 + rank)
            slot.phase(Phase.LOADING)
            slot.loaded(Source.NOTHING)
            slot.attach(0)
            slot.step(0, 0, 0, 0)
            slot.phase(Phase.BETWEEN)
        first = NodeRecord(
            job="j", run_id="1", node="n", owner=ProcessIdentity.current(), since=0.0,
            state=RunState.STARTING,
        )  # fmt: skip
        self.said: list[str] = []
        self.record = RunRecord(first, Journal(job, "n"), lambda _: None, self.said.append)
        self.watch = SteplessWatch(self, self.board, self.record)
        self.watch.begin()

    def after(self, seconds: float) -> float:
        """Poll; return for how long a Session has been open without a step, 0.0 for none."""
        self.watch.poll(self.monotonic() + seconds)
        since = self.record.node.stepless_since
        return since and self.wall() - since


@pytest.fixture
def scene(job: JobDirectory) -> Scene:
    return Scene(job)


def test_a_session_without_a_step_is_a_warning_after_a_minute(scene: Scene) -> None:
    assert (scene.after(55), scene.said) == (0.0, [])
    assert scene.after(61) == pytest.approx(61, abs=2)
    scene.after(90)
    [line] = scene.said
    assert line.startswith("no step for 61 s in the open Session, so nothing is saved")
    assert "session.batches(loader)" in line


def _steps(slot: SlotWriter) -> None:
    slot.phase(Phase.TRAINING)
    slot.step(1, 0, 0, 0)


@pytest.mark.parametrize(
    "does",
    [
        _steps,  # the first step compiles
        lambda slot: slot.phase(Phase.FETCHING),  # its first batch takes long
        lambda slot: slot.phase(Phase.EVALUATING),
        lambda slot: slot.attach(0, declares=False),
        lambda slot: slot.leave(Outcome.COMPLETED),
    ],
)
def test_a_rank_at_work_is_no_warning(scene: Scene, does: Callable[[SlotWriter], None]) -> None:
    for slot in scene.slots:
        does(slot)
    assert (scene.after(300), scene.said) == (0.0, [])


def test_the_warning_ends_with_the_first_step(scene: Scene) -> None:
    assert scene.after(100)
    _steps(scene.slots[1])
    assert not scene.after(102)


@pytest.mark.parametrize(("finished", "lines"), [(0, 1), (40, 0)])
def test_the_end_without_a_step_is_reported_unless_it_resumed_at_its_end(
    scene: Scene, finished: int, lines: int
) -> None:
    scene.watch.ended(
        Ended(incarnation=1, kind=EndKind.COMPLETED, attached=True, finished=finished)
    )
    assert len(scene.said) == lines and bool(scene.record.node.stepless_since) == bool(lines)
    assert all("closed without one step, so nothing is saved" in line for line in scene.said)


@pytest.mark.parametrize("saves_itself", [False, True])
def test_a_script_without_a_session_is_a_warning_after_a_minute(
    scene: Scene, saves_itself: bool
) -> None:
    scene.board.begin_incarnation(2)
    scene.record.node.saves_itself = saves_itself
    for rank, slot in enumerate(scene.slots):
        slot.launched(rank, 100 + rank)
    scene.after(55)
    assert not scene.record.node.sessionless and not scene.said
    scene.after(62)
    scene.after(90)
    assert scene.record.node.sessionless is not saves_itself
    assert len(scene.said) == (not saves_itself)
    assert all("creates no Session" in line and "--watch" in line for line in scene.said)


def test_a_session_that_took_long_ends_the_warning(scene: Scene) -> None:
    scene.record.node.sessionless = True
    scene.after(1)
    assert not scene.record.node.sessionless
