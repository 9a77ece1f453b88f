"""Whose the checkpoints in memory are: found by the job's identity, on whatever node."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.memory.leftover import has_moved
from elastic_ckpt.checkpoint.memory.owned_tier import MemoryUnusable, OwnedTier
from elastic_ckpt.checkpoint.memory.owner import TierOwner, read_tier_owner, tier_path
from elastic_ckpt.checkpoint.memory.tier import MemoryTier, tier_of
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import open_job
from tests.memory_tiers import own, snapshot


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


def steps(owned: OwnedTier) -> list[int]:
    return [one.seal.step for one in owned.sealed()]


def left_by_an_earlier_version(place: Path, job: JobDirectory, name: str, *saved: int) -> Path:
    """A tier whose name stands for path and node, as one was called before."""
    then = place.with_name(f"then-{name}")
    then.mkdir()
    held = own(then, job, "pod-a")
    for step in saved:
        assert snapshot(job, held.tier, step) is not None
    held.release(remove=False)
    path = place / f"elastic-ckpt-{os.getuid()}-{name}"
    held.tier.root.rename(path)
    return path


def test_a_second_supervisor_does_not_get_it(job: JobDirectory, place: Path) -> None:
    held = own(place, job)
    with pytest.raises(MemoryUnusable, match="another process uses"):
        own(place, job)
    held.release(remove=False)
    own(place, job).release(remove=True)
    assert list(place.iterdir()) == []


def test_next_run_finds_what_was_left_under_another_node_name(
    job: JobDirectory, place: Path
) -> None:
    held = own(place, job, "pod-a")
    snapshot(job, held.tier, 10)
    held.release(remove=False)
    again = own(place, job, "pod-b")
    assert steps(again) == [10] and again.tier.newest() is not None
    assert tier_of(job, str(again.tier.root)) is not None
    again.release(remove=True)
    assert list(place.iterdir()) == []


def test_every_tier_of_the_job_is_adopted_and_workers_load_the_newest(
    job: JobDirectory, place: Path
) -> None:
    old = left_by_an_earlier_version(place, job, "0" * 16, 10, 20)
    newer = left_by_an_earlier_version(place, job, "1" * 16, 30)
    owned = own(place, job)
    assert steps(owned) == [30, 20, 10]
    assert [one.seal.step for one in owned.tier.sealed()] == [30]
    assert [tier.root for tier in owned.older] == [old] and not newer.exists()
    with pytest.raises(MemoryUnusable):
        own(place, job)
    for one in owned.older[0].sealed():
        one.generation.settle(one.seal)
    owned.drop_drained()
    assert owned.older == [] and steps(owned) == [30] and not old.exists()
    owned.release(remove=False)
    assert read_tier_owner(owned.tier.root) == TierOwner(str(job.root), job.identity(), "here")


def test_an_older_tier_is_released_only_when_all_of_it_is_on_disk(
    job: JobDirectory, place: Path
) -> None:
    old = left_by_an_earlier_version(place, job, "0" * 16, 10)
    left_by_an_earlier_version(place, job, "1" * 16, 30)
    owned = own(place, job)
    owned.release(remove=True)  # the disk has step 30, and step 10 not yet
    assert [one.name for one in place.iterdir()] == [old.name]
    assert steps(own(place, job)) == [10]


def test_another_job_in_the_same_directory_gets_nothing_and_removes_nothing(
    job: JobDirectory, place: Path
) -> None:
    """The disk may not be mounted: an empty directory gets a new identity."""
    held = own(place, job)
    snapshot(job, held.tier, 10)
    held.release(remove=False)
    shutil.move(job.root, job.root.with_name("elsewhere"))
    job.prepare()
    other = own(place, job)
    assert steps(other) == [] and tier_of(job, str(held.tier.root)) is None
    other.release(remove=True)
    assert [one.seal.step for one in MemoryTier(held.tier.root).sealed()] == [10]
    shutil.rmtree(job.root)
    shutil.move(job.root.with_name("elsewhere"), job.root)
    assert steps(own(place, job)) == [10]


def test_directory_that_moved_takes_its_memory_with_it(job: JobDirectory, place: Path) -> None:
    held = own(place, job)
    snapshot(job, held.tier, 10)
    held.release(remove=False)
    moved = JobDirectory(job.root.with_name("moved"))
    job.root.rename(moved.root)
    owned = own(place, moved)
    assert steps(owned) == [] and owned.elsewhere == [held.tier.root]
    bell = owned.bell
    assert has_moved(held.tier.root, moved)
    assert owned.adopt(held.tier.root)
    assert [one.seal.step for one in owned.tier.sealed()] == [10]
    snapshot(moved, owned.tier, 20)
    assert os.read(bell, 10) == b"x"  # the bell lies where workers look
    owned.release(remove=True)
    assert list(place.iterdir()) == []


def test_copy_of_a_directory_leaves_the_memory_of_the_original(
    job: JobDirectory, place: Path
) -> None:
    held = own(place, job)
    snapshot(job, held.tier, 10)
    held.release(remove=False)
    copy = JobDirectory(job.root.with_name("copy"))
    shutil.copytree(job.root, copy.root)
    owned = own(place, copy)
    assert owned.elsewhere == [held.tier.root] and has_moved(held.tier.root, copy) is False
    linked = JobDirectory(job.root.with_name("linked"))
    linked.root.symlink_to(job.root)  # as a second mount of it
    assert has_moved(held.tier.root, linked) is True


@pytest.mark.parametrize("kind", ["link", "mode", "file"])
def test_name_that_another_user_has_taken_is_not_touched(
    job: JobDirectory, place: Path, tmp_path: Path, kind: str
) -> None:
    root = tier_path(place, job)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "link":
        root.symlink_to(elsewhere)
    elif kind == "mode":
        root.mkdir(mode=0o755)
    else:
        root.write_bytes(b"")
    with pytest.raises(MemoryUnusable, match="belongs to another user"):
        own(place, job)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"root":1}', "link", "fifo", "large", "deep"])
def test_record_that_is_damaged_loses_nothing(job: JobDirectory, place: Path, damage: str) -> None:
    """The tier's name stands for the job as well."""
    held = own(place, job)
    snapshot(job, held.tier, 10)
    held.release(remove=False)
    record = held.tier.root / "owner.json"
    record.unlink()
    if damage == "link":
        record.symlink_to("/etc/passwd")
    elif damage == "fifo":
        os.mkfifo(record)
    elif damage == "large":
        os.truncate(os.open(record, os.O_CREAT | os.O_WRONLY), 2**40)
    else:
        record.write_text("[" * 60000 if damage == "deep" else damage)
    if damage in ("link", "fifo"):
        with pytest.raises(MemoryUnusable):
            own(place, job)
        record.unlink()
    assert steps(own(place, job)) == [10]
