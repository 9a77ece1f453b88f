"""Nodes that the head leaves out: its notes of them, and who leads and takes part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.jobdir.left_out import LeftOutNode, read_left_out, remove_left_out
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.line import JournalEntry  # noqa: F401  # registers the events
from elastic_ckpt.protocol.agreement import RequestKind
from elastic_ckpt.protocol.messages import Ask, LeaveOut, Nodes, Ready
from elastic_ckpt.protocol.succession import MAX_POSITION, Follow
from elastic_ckpt.supervisor.cluster.head import HeadRole
from elastic_ckpt.supervisor.cluster.left_out import (
    BucketNotes,
    DirectoryNotes,
    LeftOutNodes,
    Notes,
)
from tests.checkpoints import open_job

N2 = LeftOutNode("n2", "its workers fail", 1e9)


def now(work: Callable[[], None]) -> None:
    work()


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


# -- notes ----------------------------------------------------------------------------------------


@pytest.fixture(params=["directory", "bucket"])
def notes(request: pytest.FixtureRequest, job: JobDirectory) -> Iterator[Notes]:
    if request.param == "directory":
        yield DirectoryNotes(job)
    else:
        pytest.importorskip("obstore")
        from tests.buckets import memory_store

        yield BucketNotes(job, memory_store())


def test_the_next_head_finds_them(notes: Notes, job: JobDirectory) -> None:
    LeftOutNodes(notes, now).add(N2)
    assert read_left_out(job) == [N2]
    later = LeftOutNodes(notes, now)
    assert later.is_read and later.take_removed(0.0) == []
    assert later.nodes == {"n2": N2}


def test_a_note_that_was_removed_lets_its_node_in_once(notes: Notes, job: JobDirectory) -> None:
    found = LeftOutNodes(notes, now)
    found.add(N2)
    assert found.take_removed(0.0) == []
    remove_left_out(job, "n2")
    assert found.take_removed(0.5) == []  # it is not time to look
    assert found.take_removed(100.0) == [] and found.take_removed(100.0) == [N2]
    assert found.nodes == {} and found.take_removed(200.0) == []
    assert LeftOutNodes(notes, now).take_removed(0.0) == [] == notes.read()


def test_a_note_that_is_still_to_be_written_lets_nobody_in(job: JobDirectory) -> None:
    waiting: list[Callable[[], None]] = []
    found = LeftOutNodes(DirectoryNotes(job), waiting.append)
    assert not found.is_read
    waiting.pop()()
    assert found.is_read
    found.add(N2)
    assert found.take_removed(0.0) == [] and len(waiting) == 2
    waiting[1]()  # the look comes first
    assert found.take_removed(0.1) == [] and found.nodes


def test_storage_that_fails_lets_nobody_in(job: JobDirectory) -> None:
    def careless(work: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):
            work()

    found = LeftOutNodes(DirectoryNotes(job), careless)
    found.add(N2)
    job.control.rename(job.root / "unmounted")
    found.take_removed(10.0)
    assert found.take_removed(20.0) == [] and found.nodes
    (job.root / "unmounted").rename(job.control)
    remove_left_out(job, "n2")
    found.take_removed(30.0)
    assert found.take_removed(40.0) == [N2]


def test_a_bucket_that_let_a_node_in_counts_more_than_an_old_copy(job: JobDirectory) -> None:
    pytest.importorskip("obstore")
    from tests.buckets import memory_store

    store = memory_store()
    BucketNotes(job, store).write(N2)
    store.delete(["left-out/n2.json"])
    assert BucketNotes(job, store).read() == [] == read_left_out(job)


@pytest.mark.parametrize("text", ["", "{}", '{"node":"other","why":"","since":1}', "[" * 99999])
def test_notes_that_are_invalid_are_not_shown(job: JobDirectory, text: str) -> None:
    job.left_out.mkdir()
    (job.left_out / "n2.json").write_text(text)
    assert read_left_out(job) == []


# -- the head -------------------------------------------------------------------------------------


class Run:
    """A run of a head on n1."""

    def __init__(self, role: HeadRole) -> None:
        self.now = 100.0
        self.role = role
        self.sent: list[Any] = []
        self.said: list[str] = []
        self.events: list[Any] = []
        self.launched: list[tuple[int, tuple[str, ...]]] = []
        self.passed_on = False
        self.goes_on: Follow | None = None
        self.agent = SimpleNamespace(send=self.sent.append, gone=False)
        self.incarnation = 1
        self.settings = SimpleNamespace(
            node="n1", endpoint="n1:29400", gather_seconds=60.0, shared_url="", directory="/job",
            grace=60.0,
        )  # fmt: skip
        directory = SimpleNamespace(pass_on=lambda: setattr(self, "passed_on", True))
        self.ports = SimpleNamespace(
            directory=directory, clock=SimpleNamespace(wall=lambda: 1e9), board=SimpleNamespace(),
            journal=SimpleNamespace(write=self.events.append),
        )  # fmt: skip
        self.saves = SimpleNamespace(hand_over_seconds=lambda nodes, grace: 0.0)
        self.record = SimpleNamespace(say=self.said.append, update=lambda **_: None)
        self.incarnations = SimpleNamespace(
            may_launch=True, is_watched=False, clean_up=lambda: True, launch=self._launch
        )

    def _launch(self, nodes: int, without: tuple[str, ...]) -> None:
        self.launched.append((nodes, without))

    def serve_saves(self, now: float) -> None:
        return

    def turn(self, nodes: Nodes, after: float = 0.0) -> None:
        """The nodes report, and the loop goes round twice."""
        self.now += after
        run: Any = self
        self.role.on_event(run, nodes)
        for _ in range(2):
            self.role.look_for_hang(run)

    def start(self) -> None:
        run: Any = self
        self.role.serve_start(run, self.now)

    @property
    def left_out(self) -> dict[str, str]:
        return next((one.nodes for one in reversed(self.sent) if isinstance(one, LeaveOut)), {})


def head(least: int, most: int, left_out: LeftOutNodes | None = None) -> tuple[HeadRole, Run]:
    role = HeadRole((least, most), left_out=left_out)
    return role, Run(role)


def test_node_whose_check_fails_takes_no_part_until_it_passes() -> None:
    role, run = head(1, 2)
    run.turn(Nodes(("n1", "n2"), 0, unfit={"n2": "disk: no"}))
    assert run.left_out == {"n2": "its check failed: disk: no"}
    assert "to let it in again: elastic-ckpt nodes /job --let-in n2" in run.said[-1]
    run.start()
    run.now += 5.0
    run.start()
    assert run.launched == [(1, ("n2",))]
    run.turn(Nodes(("n1", "n2"), 1))
    assert run.left_out == {} and "it passes its check now" in run.said[-1]
    role.serve_running(run, run.now)
    role.serve_running(run, run.now + 5.0)
    assert run.sent[-1] == Ask(RequestKind.STOP)  # to go on with both


def test_node_that_is_let_in_by_command_takes_part_whatever_its_check_says(
    job: JobDirectory,
) -> None:
    _, run = head(1, 2, LeftOutNodes(DirectoryNotes(job), now))
    unfit = Nodes(("n1", "n2"), 0, unfit={"n2": "disk: no"})
    run.turn(unfit)
    remove_left_out(job, "n2")
    run.turn(unfit, after=100.0)
    assert run.left_out == {} == {one.node: one for one in read_left_out(job)}
    run.start()
    assert run.launched == [(2, ())]
    run.turn(Nodes(("n1", "n2"), 0))
    run.turn(unfit)  # it had passed meanwhile
    assert run.left_out == {"n2": "its check failed: disk: no"}


def test_node_that_is_needed_takes_part_until_another_one_is_there() -> None:
    role, run = head(2, 2)
    unfit = {"n2": "disk: no"}
    run.turn(Nodes(("n1", "n2"), 0, unfit=unfit))
    assert not role.is_dispensable("n1")
    run.start()
    assert run.launched == [(2, ())]
    said = "the job needs at least 2 nodes and has 1 without"
    assert run.said[-1] == f"continuing with n2, although left out: {said}"
    three = Nodes(("n1", "n2", "n3"), 2, unfit=unfit, taking_part=("n1", "n2"))
    run.turn(three)
    role.serve_running(run, run.now)
    assert Ask(RequestKind.STOP) not in run.sent  # others may come, too
    role.serve_running(run, run.now + 5.0)
    assert run.sent[-1] == Ask(RequestKind.STOP)
    assert run.said[-1] == "saving, to continue without n2"
    run.start()
    assert run.launched[-1] == (2, ("n2",))


def test_all_nodes_that_fail_take_part() -> None:
    _, run = head(1, 2)
    run.turn(Nodes(("n1", "n2"), 0, unfit={"n1": "disk: full", "n2": "disk: full"}))
    run.start()
    assert run.launched == [(2, ())]
    assert run.said[-1] == "continuing with n1, n2, although left out: no other node is fit"


def test_head_that_is_left_out_lets_another_node_lead() -> None:
    role, run = head(1, 3)
    run.turn(Nodes(("n1", "n2", "n3"), 0, unfit={"n1": "GPU: 7 of 8 answer"}))
    run.start()
    run.now += 5.0
    run.start()
    assert run.launched == [] and run.passed_on
    assert run.goes_on is not None and role.place.position == MAX_POSITION


def test_next_agent_receives_them_and_a_start_waits_for_the_notes(job: JobDirectory) -> None:
    DirectoryNotes(job).write(N2)
    waiting: list[Callable[[], None]] = []
    role, run = head(1, 2, LeftOutNodes(DirectoryNotes(job), waiting.append))
    run.turn(Nodes(("n1", "n2"), 0))
    run.start()
    assert run.launched == []  # it does not know yet whom to leave out
    waiting.pop()()
    run.turn(Nodes(("n1", "n2"), 0))
    assert run.left_out == {"n2": "its workers fail"}  # its check passes, which does not matter
    run.sent.clear()
    role.on_event(run, Ready())
    run.turn(Nodes(("n1", "n2"), 0))
    assert run.sent == [LeaveOut({"n2": "its workers fail"})]
