"""Which checkpoints there are, in which order, and which one a restart takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from elastic_ckpt.checkpoint import catalog
from elastic_ckpt.checkpoint.catalog import candidates, list_checkpoints, newest_intact, scan, view
from elastic_ckpt.checkpoint.manifest import FORMAT
from elastic_ckpt.checkpoint.quarantine import set_aside
from elastic_ckpt.checkpoint.verify import mark_verified, read_manifest
from elastic_ckpt.errors import UnsupportedFormat
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.progress import ignore
from tests.checkpoints import (
    MODEL,
    change_manifest,
    flip_bit,
    make_attempt,
    make_checkpoint,
    open_job,
)


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


def broken(path: Path) -> object:
    raise OSError(5, "Input/output error")


def test_the_order_is_that_of_numbers(job: JobDirectory) -> None:
    """Step 9 is older than 10 and 100, and a later epoch is newer than any step."""
    for epoch, step in ((0, 100), (0, 9), (1, 2), (0, 10), (10, 1)):
        make_checkpoint(job, step, epoch=epoch)
    names = [path.name for path in scan(job)]
    assert names == [
        "epoch-10_step-1",
        "epoch-1_step-2",
        "epoch-0_step-100",
        "epoch-0_step-10",
        "epoch-0_step-9",
    ]


def test_only_directories_of_the_right_name_are_looked_at(
    job: JobDirectory, tmp_path: Path
) -> None:
    """Neither files nor links nor attempts nor backups by hand are checkpoints."""
    kept = make_checkpoint(job, 10)
    make_attempt(job, 40)
    job.checkpoint(0, 20).write_bytes(b"a file")
    job.checkpoint(0, 30).symlink_to(kept)
    for name in (
        "epoch-0_step-10.bak",
        "epoch-0_step-",
        "epoch-0_step-1x",
        "old",
        "epoch--1_step-2",
    ):
        (job.root / name).mkdir()
    assert scan(job) == [kept]


def test_view_shows_the_manifest(job: JobDirectory) -> None:
    """Reason, size and age of an intact one; no reason why not."""
    found = view(make_checkpoint(job, 10, epoch=3, reason="emergency"))
    assert (found.epoch, found.step, found.intact, found.why) == (3, 10, True, "")
    assert found.manifest is not None
    assert found.manifest.reason == "emergency"
    assert found.manifest.total_bytes == sum(entry.bytes for entry in found.manifest.files) > 1000
    assert found.age_seconds is not None and 0 <= found.age_seconds < 60


def test_a_view_never_raises(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for damage nor for a disk that cannot be read."""
    path = make_checkpoint(job, 10)
    flip_bit(path / MODEL)
    assert view(path).intact
    bad = view(path, ignore)
    assert (bad.intact, bad.manifest, bad.step) == (False, None, 10) and "checksum" in bad.why
    monkeypatch.setattr(catalog, "verify_quick", broken)
    assert view(path).why == "cannot be read: Input/output error"


def test_the_newest_intact_one_falls_back(job: JobDirectory) -> None:
    """Damage makes the next older one the newest; nothing intact is None."""
    paths = [make_checkpoint(job, step) for step in (9, 10, 100)]
    for path in reversed(paths):
        found = newest_intact(job)
        assert found is not None and found.path == path
        (path / MODEL).unlink()
    assert newest_intact(job) is None


def test_an_empty_directory_has_no_newest(job: JobDirectory) -> None:
    """A job that has just begun has neither a list nor a candidate."""
    assert (newest_intact(job), candidates(job), list_checkpoints(job)) == (None, [], [])


def test_candidates_end_at_the_first_that_passes(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each bad one on the way comes with its reason; older ones are not even opened."""
    old, good, bad = (make_checkpoint(job, step) for step in (9, 10, 100))
    (bad / MODEL).unlink()
    looked_at: list[Path] = []
    real = catalog.verify_quick

    def record(path: Path) -> object:
        looked_at.append(path)
        return real(path)

    monkeypatch.setattr(catalog, "verify_quick", record)
    (first, _, why), second = candidates(job)
    assert (first, str(why)) == (bad, f"{MODEL} is missing")
    assert second == (good, view(good).manifest, None)
    assert old not in looked_at


def test_a_newer_newest_is_not_passed_over(job: JobDirectory) -> None:
    """To fall back to an older one silently would throw the newer version's work away."""
    make_checkpoint(job, 10)
    newest = make_checkpoint(job, 20)
    change_manifest(newest, format=FORMAT + 1)
    with pytest.raises(UnsupportedFormat, match=r"epoch-0_step-20: .*upgrade"):
        candidates(job)


def test_an_older_one_of_a_newer_format_does_not_matter(job: JobDirectory) -> None:
    """Only what stands before the first intact one can stop a restart."""
    change_manifest(make_checkpoint(job, 10), format=FORMAT + 1)
    newest = make_checkpoint(job, 20)
    assert candidates(job) == [(newest, view(newest).manifest, None)]


def test_a_disk_that_cannot_be_read_is_not_passed_over(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older checkpoint is no answer to an error that may pass."""
    make_checkpoint(job, 10)
    monkeypatch.setattr(catalog, "verify_quick", broken)
    with pytest.raises(OSError, match="Input/output"):
        candidates(job)


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_a_seal_that_is_no_file_does_not_stop_a_restart(job: JobDirectory, kind: str) -> None:
    """It is damage of one checkpoint, not of the disk: the older one is next."""
    good, bad = make_checkpoint(job, 10), make_checkpoint(job, 20)
    seal = bad / "manifest.json"
    seal.unlink()
    if kind == "link":
        seal.symlink_to(good / "manifest.json")
    else:
        seal.mkdir()
    (first, _, why), second = candidates(job)
    assert first == bad and "manifest.json" in str(why)
    assert second == (good, view(good).manifest, None)


def test_the_list_is_newest_first_with_the_quarantine_last(job: JobDirectory) -> None:
    """What was set aside is shown with its reason and never as intact; the files of the newest are
    looked at, and those of the others are not claimed to be there."""
    for step in (9, 10, 100):
        make_checkpoint(job, step)
    set_aside(job, job.checkpoint(0, 100), "a reason")
    views = list_checkpoints(job)
    assert [(found.step, found.tier, found.intact, found.checked) for found in views] == [
        (10, "disk", True, True),
        (9, "disk", False, False),
        (100, "quarantine", False, True),
    ]
    assert [found.state for found in views] == ["intact", "sealed", "a reason"]
    assert views[-1].why == "a reason"


def test_list_looks_at_files_down_to_the_newest_intact_one(job: JobDirectory) -> None:
    """A damaged manifest is found in every one, a missing file where a restart would begin."""
    paths = {step: make_checkpoint(job, step) for step in range(1, 7)}
    for step in (6, 3):
        (paths[step] / MODEL).unlink()
    flip_bit(paths[2] / "manifest.json")
    paths[1].rename(job.checkpoint(0, 7))
    states = {found.path.name.rpartition("-")[2]: found.state for found in list_checkpoints(job)}
    assert states.pop("7").startswith("its manifest says epoch-0_step-1")
    assert "manifest is torn or changed" in states.pop("2")
    assert states == {"6": f"{MODEL} is missing", "5": "intact", "4": "sealed", "3": "sealed"}


def test_list_of_many_makes_four_calls_for_each(job: JobDirectory, tmp_path: Path) -> None:
    opened: list[str] = []
    marks = job.verified / "epoch-0_step-3"
    for step in range(1, 6):
        make_checkpoint(job, step)
    mark_verified(job, job.checkpoint(0, 3), read_manifest(job.checkpoint(0, 3)))

    def record(path: Any, *arguments: Any, **options: Any) -> int:
        opened.append(str(path))
        return real(path, *arguments, **options)

    real = os.open
    with mock.patch.object(os, "open", record), mock.patch.object(os, "lstat") as lstat:
        lstat.side_effect = lambda path: (opened.append(str(path)), os.stat(path))[1]
        views = list_checkpoints(job)
    assert [found.verified for found in views] == [False, False, True, False, False]
    below = [path for path in opened if path.startswith(f"{job.root}/epoch-0_step-")]
    older = [path for path in below if not path.startswith(f"{job.checkpoint(0, 5)}/")]
    assert older == [str(job.checkpoint(0, step) / "manifest.json") for step in (4, 3, 2, 1)]
    assert [path for path in opened if "/verified/" in path].count(str(marks)) == 1


def test_a_list_does_not_hash(job: JobDirectory) -> None:
    """A list compares sizes; a view hashes where it is asked to."""
    flip_bit(make_checkpoint(job, 10) / MODEL)
    [found] = list_checkpoints(job)
    assert found.intact
    assert not view(found.path, ignore).intact
