"""Going back to an older checkpoint: newer ones are set aside, and can be restored."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint import lineage
from elastic_ckpt.checkpoint.catalog import list_checkpoints, scan
from elastic_ckpt.checkpoint.cleanup import recover
from elastic_ckpt.checkpoint.lineage import continue_from, restore, supersede_newer, superseded
from elastic_ckpt.checkpoint.manifest import FileEntry, Manifest
from elastic_ckpt.checkpoint.ownership.fence import Ownership
from elastic_ckpt.checkpoint.ownership.job_lock import OwnedJob, Patience
from elastic_ckpt.checkpoint.ownership.read_lock import ReadLock
from elastic_ckpt.checkpoint.prune import prune, throw_away
from elastic_ckpt.checkpoint.verify import read_manifest, verify_full, verify_sizes
from elastic_ckpt.errors import CheckpointError, CheckpointRejected, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.retention import Retention
from tests.checkpoints import (
    FILES,
    MODEL,
    flip_bit,
    make_attempt,
    make_checkpoint,
    read_locked_elsewhere,
    tree,
)

OTHER = {**FILES, MODEL: b"of another branch"}


def names(job: JobDirectory) -> list[str]:
    return [path.name for path in scan(job)]


def own(job: JobDirectory) -> Ownership:
    return OwnedJob(job, "here", "mine", "", Patience()).ownership


def test_later_checkpoints_are_superseded_listed_and_restored(job: JobDirectory) -> None:
    made = {step: tree(make_checkpoint(job, step)) for step in (10, 20, 30)}
    moved = supersede_newer(job, (0, 10), "the job was continued from step 10")
    assert names(job) == ["epoch-0_step-10"]
    assert [tree(path) for path in moved] == [made[30], made[20]]
    listed = [view for view in list_checkpoints(job) if view.tier == "superseded"]
    assert sorted(view.step for view in listed) == [20, 30]
    assert all("continued from step 10" in view.why for view in listed)
    there, _ = restore(job, "epoch-0_step-30", "by hand")
    assert tree(there) == made[30]
    assert names(job) == ["epoch-0_step-30", "epoch-0_step-10"]
    assert [Path(one.path).name[:15] for one in superseded(job)] == ["epoch-0_step-20"]


def test_restoring_an_older_one_supersedes_what_is_newer(job: JobDirectory) -> None:
    for step in (10, 20):
        make_checkpoint(job, step)
    there, moved = restore(job, "epoch-0_step-10", "by hand")
    assert there == job.checkpoint(0, 10) and len(moved) == 1
    assert names(job) == ["epoch-0_step-10"]


def test_two_branches_of_one_name_are_told_apart(job: JobDirectory) -> None:
    for contents in (FILES, OTHER):
        make_checkpoint(job, 10)
        make_checkpoint(job, 20, contents=contents)
        supersede_newer(job, (0, 10), "again")
    with pytest.raises(UsageError, match="2 superseded checkpoints called epoch-0_step-20"):
        restore(job, "epoch-0_step-20", "by hand")
    for one in superseded(job):
        there, _ = restore(job, Path(one.path).name, "by hand")
        assert there.name == "epoch-0_step-20"
        verify_full(there)


def test_unknown_or_damaged_checkpoint_changes_nothing(job: JobDirectory) -> None:
    bad = make_checkpoint(job, 10)
    make_checkpoint(job, 20)
    with pytest.raises(UsageError, match="no checkpoint called epoch-0_step-15"):
        restore(job, "epoch-0_step-15", "by hand")
    with pytest.raises(UsageError, match="no checkpoint called"):
        restore(job, "../elsewhere", "by hand")
    (bad / MODEL).unlink()
    with pytest.raises(CheckpointError):
        restore(job, "epoch-0_step-10", "by hand")
    assert names(job) == ["epoch-0_step-20", "epoch-0_step-10"]


def test_step_that_a_later_run_saves_again_keeps_the_earlier_one(job: JobDirectory) -> None:
    """The bytes under a name are those of the save that was reported last."""
    make_checkpoint(job, 10, run=1)
    path = make_checkpoint(job, 10, run=2, contents=OTHER)
    assert (path / MODEL).read_bytes() == OTHER[MODEL]
    [old] = superseded(job)
    assert read_manifest(Path(old.path)).run == 1


def test_what_an_earlier_run_left_is_superseded_once_a_later_one_has_sealed(
    job: JobDirectory,
) -> None:
    """Another node kept step 130 of run 1, while run 2 went on from step 100."""
    own(job)
    make_checkpoint(job, 100, run=1)
    make_attempt(job, 130, run=1)
    make_checkpoint(job, 110, run=2)
    own(job)
    third = own(job)
    recover(job, fence=third)
    assert names(job) == ["epoch-0_step-110", "epoch-0_step-100"]
    assert [Path(one.path).name[:16] for one in superseded(job)] == ["epoch-0_step-130"]


def test_what_a_killed_run_left_is_sealed_if_no_later_one_has(job: JobDirectory) -> None:
    own(job)
    make_checkpoint(job, 100, run=1)
    make_attempt(job, 130, run=1)
    recover(job, fence=own(job))
    assert names(job) == ["epoch-0_step-130", "epoch-0_step-100"]


def test_run_from_goes_back_once(job: JobDirectory) -> None:
    """A requeue of the same command continues, and does not lose the night's work."""
    for step in (10, 20):
        make_checkpoint(job, step, run=1)
    first = own(job)
    assert "1 newer ones" in continue_from(job, "epoch-0_step-10", first)
    assert names(job) == ["epoch-0_step-10"]
    make_checkpoint(job, 15, run=first.number)
    second = own(job)
    assert "has gone back to epoch-0_step-10 before" in continue_from(
        job, "epoch-0_step-10", second
    )
    assert names(job) == ["epoch-0_step-15", "epoch-0_step-10"]


def test_what_was_left_unsealed_before_run_from_does_not_come_back(job: JobDirectory) -> None:
    make_checkpoint(job, 10, run=1)
    own(job)
    make_attempt(job, 20, run=1)
    second = own(job)
    continue_from(job, "epoch-0_step-10", second)
    recover(job, fence=second)
    assert names(job) == ["epoch-0_step-10"]
    assert len(superseded(job)) == 1


def test_damage_is_noticed_in_a_superseded_one(job: JobDirectory) -> None:
    make_checkpoint(job, 10)
    make_checkpoint(job, 20)
    [moved] = supersede_newer(job, (0, 10), "again")
    flip_bit(moved / MODEL)
    there, _ = restore(job, "epoch-0_step-20", "by hand")
    with pytest.raises(CheckpointError):
        verify_full(there)


def test_restored_branch_has_its_own_ancestors(job: JobDirectory) -> None:
    """Should the newest turn out to be damaged, the one before it is of the same branch."""
    parent = ""
    for step in (10, 20, 30, 40):
        parent = read_manifest(make_checkpoint(job, step, run=1, parent=parent)).attempt
    first = read_manifest(job.checkpoint(0, 10)).attempt
    supersede_newer(job, (0, 10), "again")
    second = read_manifest(make_checkpoint(job, 20, run=2, parent=first)).attempt
    make_checkpoint(job, 30, run=2, parent=second)
    _, moved = restore(job, "epoch-0_step-40", "by hand")
    assert [read_manifest(path).run for path in scan(job)] == [1, 1, 1, 1]
    assert names(job) == [f"epoch-0_step-{step}" for step in (40, 30, 20, 10)]
    assert sorted(read_manifest(path).run for path in moved) == [2, 2]
    assert len(superseded(job)) == 2


def test_unknown_ancestors_leave_what_an_earlier_run_sealed(job: JobDirectory) -> None:
    """Retention has deleted the parents: only what a later run sealed is surely another branch."""
    make_checkpoint(job, 10, run=1, parent="a" * 16)
    make_checkpoint(job, 40, run=1, parent="b" * 16)
    supersede_newer(job, (0, 10), "again")
    make_checkpoint(job, 20, run=2, parent="c" * 16)
    restore(job, "epoch-0_step-40", "by hand")
    assert names(job) == ["epoch-0_step-40", "epoch-0_step-10"]


def test_what_was_left_before_a_restore_does_not_come_back_in_later_runs(job: JobDirectory) -> None:
    make_checkpoint(job, 10, run=1)
    own(job)
    make_attempt(job, 20, run=1)
    restoring = own(job)
    restore(job, "epoch-0_step-10", "by hand")
    restoring.rewind()
    own(job)
    recover(job, fence=own(job))
    assert names(job) == ["epoch-0_step-10"]
    assert len(superseded(job)) == 1


def test_what_two_runs_left_does_not_become_one_line(job: JobDirectory) -> None:
    """Run 1 left step 30 in memory, run 2 an attempt at step 20, from before both."""
    own(job)
    make_checkpoint(job, 10, run=1)
    own(job)
    make_attempt(job, 20, run=2)
    third = own(job)
    make_checkpoint(job, 30, run=1)
    recover(job, fence=third)
    assert names(job) == ["epoch-0_step-30", "epoch-0_step-10"]
    assert [Path(one.path).name[:15] for one in superseded(job)] == ["epoch-0_step-20"]


def test_what_a_later_run_left_supersedes_what_it_does_not_continue(job: JobDirectory) -> None:
    """Run 1 left step 20 in memory, run 2 an attempt at step 30: it had gone on from step 10."""
    own(job)
    first = read_manifest(make_checkpoint(job, 10, run=1)).attempt
    own(job)
    make_attempt(job, 30, run=2, parent=first)
    third = own(job)
    made = tree(make_checkpoint(job, 20, run=1, parent=first))
    recover(job, fence=third)
    assert names(job) == ["epoch-0_step-30", "epoch-0_step-10"]
    [other] = superseded(job)
    assert tree(Path(other.path)) == made and "run 2 had gone on without it" in other.reason


def test_pruning_during_a_restore_leaves_what_is_restored(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        make_checkpoint(job, step)
    supersede_newer(job, (0, 10), "again")

    def verify(checkpoint: Path, files: list[FileEntry]) -> None:
        prune(job, Retention(), superseded=0)
        verify_sizes(checkpoint, files)

    monkeypatch.setattr("elastic_ckpt.checkpoint.lineage.verify_sizes", verify)
    restore(job, "epoch-0_step-20", "by hand")
    assert names(job) == ["epoch-0_step-20", "epoch-0_step-10"]


def test_restore_of_what_is_pruned_at_that_moment_says_so_and_moves_nothing(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30):
        make_checkpoint(job, step)

    def read(checkpoint: Path) -> ReadLock:
        throw_away(job, checkpoint)
        return ReadLock(checkpoint)

    monkeypatch.setattr("elastic_ckpt.checkpoint.lineage.ReadLock", read)
    with pytest.raises(CheckpointRejected, match="epoch-0_step-20 is being deleted"):
        restore(job, "epoch-0_step-20", "by hand")
    assert names(job) == ["epoch-0_step-30", "epoch-0_step-10"]


def test_ancestor_that_is_pruned_during_a_restore_is_done_without(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = ""
    for step in (10, 20, 30):
        parent = read_manifest(make_checkpoint(job, step, parent=parent)).attempt
    supersede_newer(job, (0, 10), "again")

    branch = lineage._branch

    def find(job: JobDirectory, newest: Manifest) -> tuple[list[Path], list[Path]]:
        back, other = branch(job, newest)
        throw_away(job, back[0])
        return back, other

    monkeypatch.setattr(lineage, "_branch", find)
    restore(job, "epoch-0_step-30", "by hand")
    assert names(job) == ["epoch-0_step-30", "epoch-0_step-10"]


def test_run_that_seals_late_does_not_overtake_a_restore(job: JobDirectory) -> None:
    """It had checked its number, and was suspended just before its rename."""
    first = own(job)
    make_checkpoint(job, 10, run=first.number)
    attempt = make_attempt(job, 20, run=first.number)
    second = own(job)
    continue_from(job, "epoch-0_step-10", second)
    with pytest.raises(FileNotFoundError):
        os.rename(attempt.path, job.checkpoint(0, 20))
    recover(job, fence=second)
    assert names(job) == ["epoch-0_step-10"]


def test_step_that_is_saved_again_leaves_the_one_that_is_being_read(job: JobDirectory) -> None:
    path = make_checkpoint(job, 10)
    before = tree(path)
    with read_locked_elsewhere(path):
        make_checkpoint(job, 10, contents=OTHER)
        [old] = superseded(job)
        assert tree(Path(old.path)) == before
    assert (path / MODEL).read_bytes() == OTHER[MODEL]


def test_retention_keeps_the_newest_of_each_superseded_line(job: JobDirectory) -> None:
    """The rule applies to each line by itself; only a request deletes a line's newest one."""
    for line in range(2):
        for step in (10, 20, 30, 40):
            make_checkpoint(job, step, contents={**FILES, MODEL: b"%d" % line})
        for path in supersede_newer(job, (0, 10), f"line {line}"):
            os.utime(f"{path}.json", (10**9 + line, 10**9 + line))
    make_checkpoint(job, 15)
    done = prune(job, Retention(last=1))
    assert names(job) == ["epoch-0_step-15"]
    assert [Path(one.path).name[:15] for one in superseded(job)] == ["epoch-0_step-40"] * 2
    assert [(one.step, one.keep) for one in done] == [
        (15, True), (10, False), *[(40, True), (30, False), (20, False)] * 2,
    ]  # fmt: skip
    assert list(job.trash.iterdir()) == []
    newest = max(superseded(job), key=lambda one: one.reason)
    prune(job, Retention(), superseded=1)
    assert superseded(job) == [newest] and names(job) == ["epoch-0_step-15"]
    assert [path.suffix for path in job.superseded.iterdir()].count(".json") == 1
    restore(job, Path(newest.path).name, "by hand")
    assert names(job)[0] == "epoch-0_step-40"


def test_superseded_ones_stay_while_no_other_checkpoint_is_good(job: JobDirectory) -> None:
    for step in (10, 20):
        make_checkpoint(job, step)
    supersede_newer(job, (0, 10), "again")
    flip_bit(job.checkpoint(0, 10) / MODEL)
    prune(job, Retention(), superseded=0)
    assert len(superseded(job)) == 1


def test_automatic_retention_leaves_superseded_ones_that_a_user_chose(job: JobDirectory) -> None:
    make_checkpoint(job, 10)
    for step in (20, 30, 40, 50):
        make_checkpoint(job, step, automatic=step != 20)
    supersede_newer(job, (0, 10), "again")
    prune(job, Retention(automatic=2))
    left = sorted(Path(one.path).name[:15] for one in superseded(job))
    assert left == ["epoch-0_step-20", "epoch-0_step-40", "epoch-0_step-50"]


def test_step_saved_again_and_again_keeps_the_newest_of_the_earlier_run(job: JobDirectory) -> None:
    for run in (1, 2):
        for step in (10, 20, 30):
            make_checkpoint(job, step, run=run, contents={**FILES, MODEL: b"%d" % run})
    prune(job, Retention(last=1))
    assert [Path(one.path).name[:15] for one in superseded(job)] == ["epoch-0_step-30"]


def test_superseded_checkpoint_can_be_verified(job: JobDirectory) -> None:
    for step in (10, 20):
        make_checkpoint(job, step)
    [moved] = supersede_newer(job, (0, 10), "again")
    verify_full(moved)
    other = moved.rename(moved.with_name("epoch-0_step-2"))
    with pytest.raises(CheckpointError, match="renamed or mixed up"):
        verify_full(other)


def test_run_from_a_checkpoint_of_a_named_session(job: JobDirectory) -> None:
    fold = job.session("fold0")
    fold.prepare()
    for step in (10, 20):
        make_checkpoint(fold, step, run=1, session="fold0")
    said = continue_from(job, "fold0/epoch-0_step-10", own(job))
    assert "continuing from fold0/epoch-0_step-10, 1 newer ones" in said
    assert names(fold) == ["epoch-0_step-10"] and len(superseded(fold)) == 1
