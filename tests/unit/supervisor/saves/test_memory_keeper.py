"""What a start does about memory that other runs and other jobs left."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.catalog import newest_intact
from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.memory import leftover
from elastic_ckpt.checkpoint.memory.leftover import leftovers
from elastic_ckpt.checkpoint.memory.seal import Share
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.nodes.server import MemoryServer
from elastic_ckpt.checkpoint.nodes.tier import NodesMemory
from elastic_ckpt.checkpoint.ownership.fence import Fence
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import Journal, read_journal
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.supervisor.saves.drain_target import DirectoryTarget
from elastic_ckpt.supervisor.saves.memory_keeper import MemoryKeeper
from elastic_ckpt.supervisor.settings import RunSettings
from tests.checkpoints import make_header, open_job
from tests.memory_tiers import own, snapshot

PATIENCE = 20.0


class Start:
    """A start of a job, as far as a memory tier sees it."""

    def __init__(
        self, job: JobDirectory, place: Path | None, node: str = "pod-b", endpoint: str = ""
    ) -> None:
        self.said: list[str] = []
        self.job = job
        settings = RunSettings(
            directory=job.root, script=Path("x"), args=(), name="job", node=node, memory=place,
            endpoint=endpoint,
        )  # fmt: skip
        journal = Journal(job, node)
        self.woken = threading.Event()
        self.keeper = MemoryKeeper.open(
            settings,
            job,
            DirectoryTarget(job, None, journal, self.said.append),
            journal,
            self.said.append,
            self.woken.set,
            lambda: 0,
        )

    def settle(self) -> None:
        """Listen, and turn until an incarnation may be launched."""
        self.keeper.begin()
        self.until(lambda: self.keeper.over)

    def until(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < limit
            self.woken.wait(0.01)
            self.woken.clear()
            self.keeper.serve()

    @property
    def on_disk(self) -> int:
        newest = newest_intact(self.job)
        return newest.step if newest else -1


@pytest.fixture
def place(tmp_path: Path) -> Path:
    found = tmp_path / "memory"
    found.mkdir()
    return found


def leave(job: JobDirectory, place: Path, step: int) -> Path:
    """Have a run of a job be killed with a step in memory only."""
    held = own(place, job, "pod-a")
    assert snapshot(job, held.tier, step) is not None
    held.release(remove=False)
    return held.tier.root


@pytest.mark.parametrize("finished", [True, False])
def test_share_of_a_job_that_has_finished_does_not_stay_in_memory(
    job: JobDirectory, place: Path, *, finished: bool
) -> None:
    """A node that the head did not reach when the disk had it kept its share for ever."""
    start = Start(job, place, "pod-a", endpoint="127.0.0.1:29400")
    root = Path(start.keeper.root)
    nodes = NodesMemory(root, Share(1, 1, "here", 1), acts=True)
    attempt = nodes.attempt(
        nodes.make_room(7, 0, replaces=False), "0123456789abcdef", [nodes.share]
    )
    attempt.part(1).finish(2, None)
    attempt.seal_share(make_header(DiskAttempt(job, "0123456789abcdef", 7)))
    assert len(MemoryTier(root).undrained()) == 1
    start.keeper.close(finished=finished)
    assert root.exists() is not finished


def test_start_looks_at_no_directory_of_another_job(
    job: JobDirectory, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be on a mount that never answers."""
    other = open_job(tmp_path / "other")
    leave(other, place, 16)
    read = JobDirectory.known_identity

    def refuse(self: JobDirectory) -> str:
        assert self.root == job.root, "another job's directory was looked at"
        return read(self)

    monkeypatch.setattr(JobDirectory, "known_identity", refuse)
    start = Start(job, place)
    start.settle()
    assert "checkpoints of other jobs that have not reached" in "\n".join(start.said)


@pytest.mark.parametrize("state", ["unmounted", "deleted", "another job's by now"])
def test_another_jobs_start_leaves_what_is_in_memory_only(
    job: JobDirectory, place: Path, tmp_path: Path, state: str
) -> None:
    other = open_job(tmp_path / "other")
    root = leave(other, place, 16)
    kept = tmp_path / "kept"
    shutil.move(other.root, kept)
    if state == "unmounted":
        other.root.mkdir()
    elif state == "another job's by now":
        other.prepare()
        other.identity()
    start = Start(job, place)
    start.settle()
    start.keeper.close()
    assert [(one.tier, one.step) for one in leftovers([place])] == [(root, 16)]
    shutil.rmtree(other.root, ignore_errors=True)
    shutil.move(kept, other.root)
    again = Start(other, place)
    again.settle()
    assert again.on_disk == 16
    again.keeper.close()
    assert list(place.iterdir()) == []


def test_run_in_the_empty_mount_point_says_what_it_misses(
    job: JobDirectory, place: Path, tmp_path: Path
) -> None:
    root = leave(job, place, 16)
    shutil.move(job.root, tmp_path / "kept")
    job.prepare()
    start = Start(job, place)
    assert start.said[-1] == (
        f"step 16 of an earlier job in {job.root} is in memory only, in {root}: "
        "is its disk mounted?"
    )


def test_node_with_another_name_brings_it_to_the_disk(job: JobDirectory, place: Path) -> None:
    leave(job, place, 16)
    start = Start(job, place, "pod-b")
    start.settle()
    assert start.on_disk == 16 and next(one.name for one in read_journal(job)) == "adopted"
    assert start.said[-1].startswith("step 16 of an earlier run is in memory")
    start.keeper.close()
    assert list(place.iterdir()) == []


def test_directory_that_moved_is_asked_for_in_a_child_and_adopted(
    job: JobDirectory, place: Path
) -> None:
    leave(job, place, 16)
    moved = JobDirectory(job.root.with_name("moved"))
    job.root.rename(moved.root)
    start = Start(moved, place)
    start.settle()
    assert start.on_disk == 16
    start.keeper.close()
    assert list(place.iterdir()) == []


def test_copy_leaves_the_originals_memory_alone(job: JobDirectory, place: Path) -> None:
    root = leave(job, place, 16)
    copy = JobDirectory(job.root.with_name("copy"))
    shutil.copytree(job.root, copy.root)
    start = Start(copy, place)
    start.settle()
    assert start.on_disk == -1 and [one.tier for one in leftovers([place])] == [root]
    assert "this directory may be a copy of it" in start.said[-1]
    start.keeper.close()
    assert root.exists()


def test_directory_that_does_not_answer_holds_a_start_up_for_seconds_only(
    job: JobDirectory, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = leave(job, place, 16)
    moved = JobDirectory(job.root.with_name("moved"))
    job.root.rename(moved.root)
    monkeypatch.setattr(leftover, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(leftover, "_is_gone", lambda *_: time.sleep(3600))
    monkeypatch.setattr("elastic_ckpt.util.in_child.PATIENCE_SECONDS", 0.2)
    start = Start(moved, place)
    began = time.monotonic()
    start.keeper.begin()
    start.keeper.serve()
    assert time.monotonic() - began < 0.3 and not start.keeper.over  # the loop hears a notice
    start.until(lambda: start.keeper.over)
    assert [one.tier for one in leftovers([place])] == [root]


def test_run_without_a_memory_tier_says_what_it_leaves_there(
    job: JobDirectory, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = leave(job, place, 16)
    monkeypatch.setattr(
        "elastic_ckpt.supervisor.saves.memory_keeper._earlier_places", lambda job: [place]
    )
    start = Start(job, None)
    assert start.said == [
        f"step 16 is in memory only, in {root}: run once with --memory-dir {place} to bring it to "
        "the disk"
    ]


@pytest.mark.parametrize("is_kept", [True, False])
def test_node_that_follows_owes_its_share_until_it_is_elsewhere(
    job: JobDirectory, place: Path, is_kept: bool
) -> None:
    """On the disk, by the head's drain, or with a node that stays; then its memory can go."""
    settings = RunSettings(
        directory=job.root, script=Path("x"), args=(), name="job", node="n2", memory=place,
        endpoint="127.0.0.1:29400", nodes=(1, 2), replicas=1,
    )  # fmt: skip
    keeper = MemoryKeeper.open(
        settings,
        job,
        DirectoryTarget(job, None, Journal(job, "n2"), print),
        Journal(job, "n2"),
        print,
        lambda: None,
        lambda: 0,
    )
    share, other = Share(1, 1, *keeper.server), Share(0, 1, "elsewhere", 1, "other")
    tier = NodesMemory(Path(keeper.root), share, acts=True, replicas=1)
    attempt = tier.attempt(tier.make_room(7, 1000, replaces=False), "7" * 16, [other, share])
    assert keeper.owed() is None
    part = attempt.part(1)
    part.write("ranks/00001.json", b"{}")
    part.finish(2, None)
    attempt.seal_share(make_header(DiskAttempt(job, "7" * 16, 7), world_size=2))
    owed = keeper.owed()
    assert owed is not None and owed.seal.step == 7 and keeper.kept_by_peer() is None
    if is_kept:
        attempt.note_keeper("h1")
        assert keeper.owed() is None and keeper.kept_by_peer() == (owed.age, "h1")
    keeper.close()
    assert Path(keeper.root).exists() is not is_kept


class HandedOver:
    """Node n1 leads and leaves; n2 keeps what it had, and has sealed last."""

    def __init__(self, job: JobDirectory, place: Path) -> None:
        self.job = job
        self.before = self.open("n1", place / "m1", run=1)
        self.after = self.open("n2", place / "m2")
        nodes = [self.before, self.after]
        shares = [
            Share(rank, 1, *one.server, leaves=one is self.before) for rank, one in enumerate(nodes)
        ]
        made = []
        header = make_header(DiskAttempt(job, "7" * 16, 7), world_size=2, run=1)
        for rank, one in enumerate(nodes):
            tier = NodesMemory(Path(one.root), shares[rank], acts=True, replicas=1)
            made.append(tier.attempt(tier.make_room(7, 9, replaces=False), "7" * 16, shares))
            part = made[rank].part(rank)
            part.write(f"ranks/{rank:05d}.json", b"{}")
            part.finish(2, None)
        made[0].seal_share(header)
        assert self.before.not_on_disk() is None  # this alone is no checkpoint
        keeper = made[0].hand_over(time.monotonic() + PATIENCE)
        made[1].seal_last(header, Retention(), [keeper])
        made[0].note_keeper("h2")

    def open(
        self, node: str, place: Path, run: int = 0, served: MemoryServer | None = None
    ) -> MemoryKeeper:
        """Open a node's memory, as the head if it has the number of a ``run``."""
        place.mkdir(exist_ok=True)
        settings = RunSettings(
            directory=self.job.root, script=Path("x"), args=(), name="job", node=node, memory=place,
            endpoint="127.0.0.1:29400", nodes=(1, 2), replicas=1,
        )  # fmt: skip
        journal = Journal(self.job, node)
        target = DirectoryTarget(self.job, Fence(self.job, run) if run else None, journal, print)
        return MemoryKeeper.open(
            settings, self.job, target, journal, print, lambda: None, lambda: 0, served=served
        )


def test_a_head_that_leaves_waits_for_no_drain(job: JobDirectory, place: Path) -> None:
    handed = HandedOver(job, place)
    head = handed.before
    head.hurry()
    assert head.over and head.not_on_disk() is None and head.owed() is None
    kept = head.kept_by_peer()
    assert kept is not None and kept[1] == "h2"
    assert handed.after.owed() is not None  # until the next head has drained it
    head.close()
    assert not Path(head.root).exists()
    handed.after.close()


@pytest.mark.parametrize("is_passed_on", [True, False])
def test_the_next_head_drains_what_was_handed_over(
    job: JobDirectory, place: Path, is_passed_on: bool
) -> None:
    """At once if the head has passed the job on; else the ranks find it."""
    handed = HandedOver(job, place)
    handed.before.close()
    handed.after.close(keep=True)
    served = handed.after.hand_server(is_passed_on=is_passed_on)
    assert (served is not None) is is_passed_on
    head = handed.open("n2", place / "m2", 2, served)
    head.begin()
    until = time.monotonic() + PATIENCE
    while not head.over and time.monotonic() < until:
        head.serve()
        time.sleep(0.01)
    newest = newest_intact(job)
    assert (newest is not None and newest.step == 7) is is_passed_on
    head.close()
