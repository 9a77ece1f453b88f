"""From memory to the disk, beside the loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_ckpt.checkpoint.catalog import scan
from elastic_ckpt.checkpoint.disk import tier as disk_tier
from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.memory import drain as drains
from elastic_ckpt.checkpoint.memory.generation import Generation
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.verify import read_manifest, verify_full
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import Journal, read_journal
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.supervisor.saves.drain_target import DirectoryTarget
from elastic_ckpt.supervisor.saves.drainer import Drainer
from elastic_ckpt.util import progress
from tests.checkpoints import MODEL
from tests.memory_tiers import own, snapshot

PATIENCE = 20.0


class Loop:
    """What the supervisor's loop does, as far as a drainer sees it."""

    def __init__(self, job: JobDirectory, tier: MemoryTier) -> None:
        self.said: list[str] = []
        self._woken = threading.Event()
        journal = Journal(job, "here")
        target = DirectoryTarget(job, None, journal, self.said.append)
        self.drainer = Drainer(target, tier, journal, self.said.append, self._woken.set)

    def until(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < limit, "the drain did not come to its end"
            self._woken.wait(0.01)
            self._woken.clear()
            self.drainer.serve(sealed=True)


@pytest.fixture
def tier(job: JobDirectory, tmp_path: Path) -> Iterator[MemoryTier]:
    place = tmp_path / "memory"
    place.mkdir()
    held = own(place, job)
    yield held.tier
    held.release(remove=True)


@pytest.fixture
def loop(job: JobDirectory, tier: MemoryTier) -> Loop:
    return Loop(job, tier)


class Gate:
    """Holds every drain up behind its first chunk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        copy = drains._copy_file

        def wait_first(*arguments: Any) -> Iterator[int]:
            self.reached.set()
            self.open.wait(PATIENCE)
            yield from copy(*arguments)

        monkeypatch.setattr(drains, "_copy_file", wait_first)


class Noticed(threading.Event):
    """Reports that the loop waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_waited_for = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        if not self.is_set():
            self.is_waited_for.set()
        return super().wait(timeout)


def events(job: JobDirectory, name: str) -> list[dict[str, Any]]:
    return [event.data for event in read_journal(job) if event.name == name]


def on_disk(job: JobDirectory) -> list[int]:
    return [read_manifest(path).step for path in scan(job)]


def test_what_is_drained_is_a_checkpoint_and_may_be_overwritten(
    job: JobDirectory, tier: MemoryTier, loop: Loop
) -> None:
    made = snapshot(job, tier, 10)
    assert made is not None and not made.settled
    loop.drainer.serve(sealed=True)
    loop.until(lambda: loop.drainer.over)
    assert made.settled and DiskTier(job).holds(made.seal)
    manifest = verify_full(job.checkpoint(0, 10))
    assert manifest.attempt == made.seal.attempt and manifest.world_size == 2
    for entry in made.seal.files:
        source = made.generation.path / entry.path
        assert (job.checkpoint(0, 10) / entry.path).read_bytes() == source.read_bytes()
    [told] = events(job, "drained")
    assert (told["step"], told["bytes"]) == (10, made.seal.total_bytes)


def test_in_their_order_and_the_newest_first_in_a_hurry(
    job: JobDirectory, tier: MemoryTier, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    snapshot(job, tier, 10)
    loop.drainer.serve(sealed=True)
    assert gate.reached.wait(PATIENCE)
    snapshot(job, tier, 20)
    loop.drainer.hurry()
    gate.open.set()
    loop.until(lambda: loop.drainer.over)
    assert [told["step"] for told in events(job, "drained")] == [20, 10]
    assert on_disk(job) == [20, 10] and list(job.attempts.iterdir()) == []


def test_what_is_held_writes_nothing_until_the_hurry(
    job: JobDirectory, tier: MemoryTier, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drain that is under way stops behind its chunk; one that has not begun does not."""
    gate = Gate(monkeypatch)
    snapshot(job, tier, 10)
    loop.drainer.serve(sealed=True)
    assert gate.reached.wait(PATIENCE)
    held = Noticed()
    monkeypatch.setattr(loop.drainer, "_may_write", held)
    loop.drainer.hold()
    gate.open.set()
    assert held.is_waited_for.wait(PATIENCE)
    loop.drainer.serve(sealed=False)
    assert on_disk(job) == [] and not loop.drainer.over
    loop.drainer.hurry()
    loop.until(lambda: loop.drainer.over)
    assert on_disk(job) == [10]
    loop.drainer.hold()
    snapshot(job, tier, 20)
    loop.drainer.serve(sealed=False)
    assert loop.drainer.attempt == ""
    loop.drainer.serve(sealed=True)  # the ranks saved into memory after all: it is wanted
    loop.until(lambda: loop.drainer.over)
    assert on_disk(job) == [20, 10]


def test_without_a_hurry_the_older_one_comes_first(
    job: JobDirectory, tier: MemoryTier, loop: Loop
) -> None:
    snapshot(job, tier, 10)
    snapshot(job, tier, 20)
    loop.until(lambda: on_disk(job) == [20, 10] and loop.drainer.over)
    assert [told["step"] for told in events(job, "drained")] == [10, 20]


def test_a_drain_that_fails_keeps_what_is_in_memory_and_is_tried_again(
    job: JobDirectory, tier: MemoryTier, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = snapshot(job, tier, 10)
    assert made is not None
    with monkeypatch.context() as broken:
        broken.setattr(
            disk_tier, "ensure_space", lambda *_: (_ for _ in ()).throw(OSError(5, "bad"))
        )
        loop.drainer.serve(sealed=True)
        loop.until(lambda: loop.drainer.over)
        assert [told["error"] for told in events(job, "drain_failed")] == ["[Errno 5] bad"]
        assert "step 10 stays in memory" in loop.said[0]
        assert loop.drainer.pending() == [made] and on_disk(job) == []
        assert tier.sealed() == [made]
    loop.drainer.hurry()
    loop.until(lambda: loop.drainer.over)
    assert on_disk(job) == [10] and loop.drainer.pending() == []


def test_drain_that_fails_as_the_hurry_starts_is_retried_once(
    job: JobDirectory, tier: MemoryTier, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    assert snapshot(job, tier, 10) is not None
    whole, failures = drains.header_of, iter([OSError(28, "full")])

    def fail_once(*seal: object) -> object:
        for error in failures:
            raise error
        return whole(*seal)

    monkeypatch.setattr(drains, "header_of", fail_once)
    loop.drainer.serve(sealed=True)
    assert gate.reached.wait(PATIENCE)
    loop.drainer.hurry()
    gate.open.set()
    loop.until(lambda: loop.drainer.over)
    assert len(events(job, "drain_failed")) == 1
    assert on_disk(job) == [10]


def test_what_was_drained_is_not_drained_again_if_the_tier_cannot_note_it(
    job: JobDirectory, tier: MemoryTier, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full memory has no room for the note."""
    monkeypatch.setattr(Generation, "settle", lambda self, seal: None)
    made = snapshot(job, tier, 10)
    assert made is not None
    loop.drainer.serve(sealed=True)
    loop.until(lambda: loop.drainer.over)
    for _ in range(5):
        loop.drainer.serve(sealed=True)
        loop.drainer.hurry()
    assert loop.drainer.over and loop.drainer.pending() == [] and not loop.drainer.lacks(made)
    assert len(events(job, "drained")) == 1 and not made.settled


def test_one_that_cannot_be_read_is_given_up(
    job: JobDirectory, tier: MemoryTier, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer that shrank between seal and drain is no checkpoint, on any tier."""
    gate = Gate(monkeypatch)
    made = snapshot(job, tier, 10)
    assert made is not None
    loop.drainer.serve(sealed=True)
    assert gate.reached.wait(PATIENCE)
    (made.generation.path / MODEL).write_bytes(b"short")
    gate.open.set()
    loop.until(lambda: loop.drainer.over)
    assert tier.sealed() == [] and on_disk(job) == []
    assert len(events(job, "drain_failed")) == 1


def test_retention_of_the_snapshot_applies_after_its_drain(
    job: JobDirectory, tier: MemoryTier, loop: Loop
) -> None:
    for step in (10, 20, 30):
        assert snapshot(job, tier, step, retention=Retention(last=1)) is not None
        loop.until(lambda: loop.drainer.over)
        loop.drainer.finish_pruning(lambda: False)
    assert on_disk(job)[0] == 30 and len(on_disk(job)) <= 2


def test_what_a_killed_run_left_is_brought_to_the_disk(
    job: JobDirectory, tier: MemoryTier, loop: Loop
) -> None:
    made = snapshot(job, tier, 10)
    assert [one.seal.step for one in loop.drainer.adopt()] == [10] and made is not None
    loop.drainer.hurry()
    loop.until(lambda: loop.drainer.over)
    assert on_disk(job) == [10]
    again = Loop(job, tier)
    assert again.drainer.adopt() == [] and tier.sealed() == [made]


def test_what_was_deleted_on_disk_does_not_come_back(job: JobDirectory, tier: MemoryTier) -> None:
    made = snapshot(job, tier, 10)
    assert made is not None
    made.generation.settle(made.seal)
    assert Loop(job, tier).drainer.adopt() == []
    assert tier.sealed() == []


def test_long_drain_shows_its_progress(
    job: JobDirectory, tier: MemoryTier, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    snapshot(job, tier, 10)
    loop.drainer.serve(sealed=True)
    loop.drainer.serve(sealed=False)
    assert loop.said == []  # the loop does not wait
    loop.drainer.hurry()
    loop.drainer.serve(sealed=False)
    assert loop.said and loop.said[0].startswith(
        "bringing step 10 from memory to the disk: 0 %, 0 Bytes of "
    )
    gate.open.set()
    loop.until(lambda: loop.drainer.over)
