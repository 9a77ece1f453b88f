"""What is set aside keeps its bytes and its reason, and is never chosen again."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.catalog import newest_intact, scan
from elastic_ckpt.checkpoint.quarantine import rejected, set_aside
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import make_checkpoint, open_job, tree


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


def test_what_is_set_aside_keeps_its_bytes_and_its_reason(job: JobDirectory) -> None:
    """It is moved, not copied and not deleted."""
    path = make_checkpoint(job, 10)
    before = tree(path)
    target = set_aside(job, path, "it was bad")
    assert not path.exists()
    assert target.parent == job.quarantine and target.name.startswith("epoch-0_step-10-")
    assert tree(target) == before
    [record] = rejected(job)
    assert (record.path, record.reason) == (str(target), "it was bad")


def test_what_is_set_aside_is_never_chosen(job: JobDirectory) -> None:
    """Not even when it is intact and the only one."""
    set_aside(job, make_checkpoint(job, 10), "to be looked at")
    assert scan(job) == []
    assert newest_intact(job) is None


def test_the_same_name_may_be_set_aside_again(job: JobDirectory) -> None:
    """Two within one second do not collide."""
    targets = {set_aside(job, make_checkpoint(job, 10), f"reason {n}") for n in range(4)}
    assert len(targets) == 4
    assert {record.reason for record in rejected(job)} == {f"reason {n}" for n in range(4)}


def test_a_race_that_another_won_is_no_error(job: JobDirectory) -> None:
    """What is gone already leaves no record of something that is not there."""
    set_aside(job, job.checkpoint(0, 10), "gone before")
    assert rejected(job) == []
    assert list(job.quarantine.iterdir()) == []


def test_a_kill_between_the_reason_and_the_move_sets_nothing_aside(job: JobDirectory) -> None:
    """A reason whose checkpoint is not there was never carried out."""
    set_aside(job, make_checkpoint(job, 10), "known")
    (job.quarantine / "ghost.json").write_bytes((next(job.quarantine.glob("*.json"))).read_bytes())
    assert [record.reason for record in rejected(job)] == ["known"]


def test_a_moved_job_directory_still_knows_what_it_set_aside(job: JobDirectory) -> None:
    """Paths are those of today, not those of the day it happened."""
    set_aside(job, make_checkpoint(job, 10), "known")
    moved = JobDirectory(job.root.rename(job.root.with_name("moved")))
    (record,) = rejected(moved)
    assert record.path.startswith(str(moved.quarantine))


def test_a_missing_quarantine_is_made(job: JobDirectory) -> None:
    """Somebody who cleans up by hand may remove it."""
    path = make_checkpoint(job, 10)
    job.quarantine.rmdir()
    assert set_aside(job, path, "bad").is_dir()


def test_an_unreadable_reason_does_not_hide_the_others(job: JobDirectory) -> None:
    """It is listed as unreadable."""
    set_aside(job, make_checkpoint(job, 10), "known")
    (job.quarantine / "torn").mkdir()
    (job.quarantine / "torn.json").write_bytes(b'{"path": "x')
    assert sorted(record.reason for record in rejected(job)) == [
        "its reason is not readable",
        "known",
    ]
