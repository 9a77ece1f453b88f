"""When a run need not look at all records again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from elastic_ckpt.jobdir import runs_watch
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.runs_watch import RunsWatch


def settled(job: JobDirectory) -> RunsWatch:
    watch = RunsWatch(job)
    for _ in range(2):
        assert not watch.is_calm()
        watch.checked()
    assert watch.is_calm()
    return watch


def test_new_record_is_noticed(job: JobDirectory) -> None:
    watch = settled(job)
    (job.runs / "000002.json").touch()
    assert not watch.is_calm()


def test_removed_record_is_noticed(job: JobDirectory) -> None:
    (job.runs / "000001.json").touch()
    watch = settled(job)
    (job.runs / "000001.json").unlink()
    assert not watch.is_calm()


def test_beat_changes_nothing(job: JobDirectory) -> None:
    beat = job.runs / "000001.beat"
    beat.write_text("1")
    watch = settled(job)
    beat.write_text("2")
    assert watch.is_calm()


def test_full_check_that_failed_is_repeated(job: JobDirectory) -> None:
    watch = RunsWatch(job)
    assert not any(watch.is_calm() for _ in range(5))


@pytest.mark.parametrize("how", ["moved", "deleted", "copied", "made anew"])
def test_directory_that_is_not_there_any_more_is_noticed(
    job: JobDirectory, tmp_path: Path, how: str
) -> None:
    watch = settled(job)
    old = job.root.rename(tmp_path / "old")
    if how == "deleted":
        shutil.rmtree(old)
    if how == "copied":
        shutil.copytree(old, job.root)
    if how == "made anew":
        job.prepare()
    assert not watch.is_calm()


def test_second_change_in_the_same_tick_of_a_slow_clock_is_noticed(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stamp of the first change also covers a second one; both are before the next beat."""
    watch = settled(job)
    monkeypatch.setattr(runs_watch, "stamp_of", lambda directory: (1,))
    assert not watch.is_calm()
    watch.checked()
    assert not watch.is_calm()  # so that a second full check finds the second change
