"""Named sessions on the disk: each is a checkpoint root of its own inside the job."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.catalog import (
    list_checkpoints,
    newest_and_rejected,
    newest_intact,
    newest_of_job,
    next_session_order,
    view,
)
from elastic_ckpt.checkpoint.cleanup import recover
from elastic_ckpt.checkpoint.manifest import decode_manifest, encode, make_manifest
from elastic_ckpt.checkpoint.prune import prune
from elastic_ckpt.checkpoint.quarantine import set_aside
from elastic_ckpt.checkpoint.verify import mark_verified, read_manifest
from elastic_ckpt.errors import CheckpointRejected, DirectoryUnusable
from elastic_ckpt.jobdir.paths import JobDirectory, is_session_name
from elastic_ckpt.policy.retention import Retention
from tests.checkpoints import make_checkpoint


def session(job: JobDirectory, name: str) -> JobDirectory:
    found = job.session(name)
    found.prepare()
    return found


def save(job: JobDirectory, step: int, order: int) -> Path:
    return make_checkpoint(job, step, session=job.name, session_order=order)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("fold0", True), ("a.b-c_D", True), ("-", True), ("x" * 64, True), ("x" * 65, False),
        ("", False), (".hidden", False), ("..", False), ("a/b", False), ("fold 0", False),
        ("é", False), ("a\n", False),
    ],
)  # fmt: skip
def test_session_names(name: str, is_one: bool) -> None:
    assert is_session_name(name) is is_one


def test_newest_of_the_job_is_that_of_the_session_opened_last(job: JobDirectory) -> None:
    """Whatever its step, so that a save in the second session counts as new."""
    save(session(job, "fold0"), 400, 0)
    small = save(session(job, "fold1"), 4, 1)
    newest = newest_of_job(job)
    assert newest is not None and newest.path == small and newest.age == (1, 0, 4)
    found = newest_and_rejected(job)[0]
    assert found is not None and found.path == small
    assert newest_intact(job) is None  # the unnamed session has none
    assert [one.shown for one in list_checkpoints(job)] == [
        "fold1/epoch-0_step-4", "fold0/epoch-0_step-400",
    ]  # fmt: skip


def test_session_that_is_opened_again_comes_after_the_others(job: JobDirectory) -> None:
    first, second = session(job, "fold0"), session(job, "fold1")
    assert next_session_order(first, None) == 0
    save(first, 400, 0)
    assert next_session_order(first, None) == 0
    assert next_session_order(second, None) == 1
    save(second, 4, 1)
    assert next_session_order(second, None) == 1
    assert next_session_order(first, None) == next_session_order(job, None) == 2


def test_each_session_is_pruned_verified_and_quarantined_by_itself(job: JobDirectory) -> None:
    first, second = session(job, "fold0"), session(job, "fold1")
    for order, one in enumerate((first, second)):
        for step in (1, 2, 3):
            save(one, step, order)
    path = first.checkpoint(0, 3)
    mark_verified(first, path, read_manifest(path))
    assert view(path).verified and not view(second.checkpoint(0, 3)).verified
    prune(first, Retention(last=1))
    assert [one.shown for one in list_checkpoints(job)] == [
        "fold1/epoch-0_step-3", "fold1/epoch-0_step-2", "fold1/epoch-0_step-1",
        "fold0/epoch-0_step-3",
    ]  # fmt: skip
    aside = set_aside(second, second.checkpoint(0, 3), "a test")
    assert aside.parent == second.quarantine
    assert [one.session for one in newest_and_rejected(job)[1]] == ["fold1"]


def test_unfinished_attempts_of_all_sessions_are_removed(job: JobDirectory) -> None:
    left = session(job, "fold0").attempts / f"5-{'a' * 16}"
    left.mkdir()
    assert [path for path, _ in recover(job)] == [left]
    assert not left.exists()


def test_commands_take_a_session_by_its_directory(job: JobDirectory) -> None:
    fold = session(job, "fold0")
    save(fold, 3, 0)
    found = JobDirectory.at(fold.root)
    assert found == fold and found.home == job.root and found.control == job.control
    assert [one.shown for one in list_checkpoints(found)] == ["fold0/epoch-0_step-3"]


def test_job_called_sessions_is_no_session(tmp_path: Path) -> None:
    place = tmp_path / "sessions" / "mine"
    place.mkdir(parents=True)
    assert JobDirectory.at(place).name == ""


def test_links_in_place_of_a_session_are_refused(job: JobDirectory, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (job.root / "sessions").mkdir()
    (job.root / "sessions" / "fold0").symlink_to(outside)
    assert job.sessions() == [job]
    with pytest.raises(DirectoryUnusable):
        job.session("fold0").prepare()
    assert list(outside.iterdir()) == []


def test_session_names_in_manifests_are_checked(job: JobDirectory) -> None:
    manifest = read_manifest(save(job, 3, 0))
    bad = encode(make_manifest(type(manifest)(**{**_fields(manifest), "session": "../x"}), []))
    with pytest.raises(CheckpointRejected, match="session"):
        decode_manifest(bad)


def _fields(manifest: object) -> dict[str, object]:
    return {name: getattr(manifest, name) for name in manifest.__struct_fields__}  # type: ignore[attr-defined]
