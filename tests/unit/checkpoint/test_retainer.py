"""Retention behind the training's back."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint import prune as retainers
from elastic_ckpt.checkpoint import retainable
from elastic_ckpt.checkpoint.catalog import scan
from elastic_ckpt.checkpoint.lineage import supersede_newer
from elastic_ckpt.checkpoint.prune import Retainer, prune
from elastic_ckpt.checkpoint.verify import mark_verified, read_manifest
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import Journal, read_journal
from elastic_ckpt.policy.retention import Retention
from tests.checkpoints import MODEL, make_checkpoint, open_job


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


@pytest.fixture
def retainer(job: JobDirectory) -> Retainer:
    made = Retainer(job, Journal(job, "here"), lambda line: None)
    made.rule = Retention(last=1)
    return made


def make(job: JobDirectory, *steps: int) -> None:
    for step in steps:
        make_checkpoint(job, step)


def names(job: JobDirectory) -> list[str]:
    return [path.name for path in scan(job)]


def events(job: JobDirectory) -> list[tuple[str, object]]:
    return [(event.name, event.data.get("step")) for event in read_journal(job)]


def never() -> bool:
    return False


def test_what_went_stands_in_the_journal(job: JobDirectory, retainer: Retainer) -> None:
    make(job, 10, 20, 30)
    retainer.after_save()
    retainer.finish(never)
    assert names(job) == ["epoch-0_step-30"]
    assert events(job) == [("pruned", 20), ("pruned", 10)]


def prune_now(retainer: Retainer) -> None:
    retainer.after_save()
    retainer.finish(never)


def test_later_pass_looks_at_what_is_new_and_what_it_relies_upon(
    job: JobDirectory, retainer: Retainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not grow with what is kept."""
    looked: list[str] = []
    look = retainable.look_at
    monkeypatch.setattr(
        retainable, "look_at", lambda path: (looked.append(path.name), look(path))[1]
    )
    retainer.rule = Retention(last=20)
    make(job, *range(10, 30))
    supersede_newer(job, (0, 25), "again")
    prune_now(retainer)
    assert len(looked) == 20
    make(job, *range(26, 32))
    looked.clear()
    prune_now(retainer)
    assert names(job)[-1] == "epoch-0_step-12"
    new = [f"epoch-0_step-{step}" for step in range(31, 25, -1)]
    assert looked == [*new, "epoch-0_step-11", "epoch-0_step-10"]
    assert len(names(job)) == 20
    looked.clear()
    prune_now(retainer)
    assert looked == []


@pytest.mark.parametrize("lost", [50, 20, 10], ids=["newest", "verified", "deleted"])
def test_damage_since_the_last_pass_is_found_before_anything_is_deleted(
    job: JobDirectory, retainer: Retainer, lost: int
) -> None:
    """The newest and the verified one must be able to stand for what goes; what is damaged by now
    is not deleted."""
    make(job, 10, 20, 30, 40, 50)
    path = job.checkpoint(0, 20)
    mark_verified(job, path, read_manifest(path))
    retainer.rule = Retention(last=5)
    prune_now(retainer)  # remembers all of them
    (job.checkpoint(0, lost) / MODEL).unlink()
    retainer.rule = Retention(last=2)
    prune_now(retainer)
    left = {int(name.rpartition("-")[2]) for name in names(job)}
    kept = {50: {50, 40, 30, 20}, 20: {50, 40, 20}, 10: {50, 40, 20, 10}}
    assert left == kept[lost]


def test_checkpoint_that_took_the_place_of_a_known_one_is_looked_at(
    job: JobDirectory, retainer: Retainer
) -> None:
    retainer.rule = Retention(best=1, metric="loss")
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
        make_checkpoint(job, step, metrics={"loss": loss})
    prune_now(retainer)
    assert names(job) == ["epoch-0_step-30", "epoch-0_step-20"]
    shutil.rmtree(job.checkpoint(0, 20))
    make_checkpoint(job, 20, metrics={"loss": 9.0})  # may get the same inode
    for step, loss in ((40, 1.5), (50, 5.0)):
        make_checkpoint(job, step, metrics={"loss": loss})
    prune_now(retainer)
    assert names(job) == ["epoch-0_step-50", "epoch-0_step-40", "epoch-0_step-30"]


def test_without_a_rule_there_is_no_thread(job: JobDirectory, retainer: Retainer) -> None:
    make(job, 10, 20)
    retainer.rule = Retention()
    before = threading.active_count()
    retainer.after_save()
    retainer.make_room()
    assert threading.active_count() == before and len(names(job)) == 2


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event, list[int]]:
    """Keeps a pass of retention from beginning; counts the passes."""
    entered, leave, passes = threading.Event(), threading.Event(), []

    def wait_first(*arguments: object, **options: object) -> object:
        passes.append(1)
        entered.set()
        leave.wait(30)
        return prune(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(retainers, "prune", wait_first)
    return entered, leave, passes


def test_save_during_a_pass_is_handled_by_the_next(
    job: JobDirectory,
    retainer: Retainer,
    held: tuple[threading.Event, threading.Event, list[int]],
) -> None:
    """However many come, once more is enough; the last one is never left out."""
    entered, leave, passes = held
    make(job, 10, 20)
    retainer.after_save()
    assert entered.wait(30)
    make(job, 30)
    for _ in range(5):
        retainer.after_save()
    leave.set()
    retainer.finish(never)
    assert len(passes) == 2
    assert names(job)[0] == "epoch-0_step-30" and "epoch-0_step-10" not in names(job)


def test_a_notice_does_not_wait_for_it(
    retainer: Retainer, held: tuple[threading.Event, threading.Event, list[int]]
) -> None:
    _, leave, _ = held
    retainer.after_save()
    retainer.finish(lambda: True)
    assert not leave.is_set()
    leave.set()
    retainer.finish(never)


def test_room_is_made_after_the_running_pass(
    job: JobDirectory,
    retainer: Retainer,
    held: tuple[threading.Event, threading.Event, list[int]],
) -> None:
    entered, leave, _ = held
    make(job, 10, 20)
    retainer.after_save()
    assert entered.wait(30)
    timer = threading.Timer(0.05, leave.set)
    timer.start()
    retainer.make_room()
    timer.join(30)
    assert names(job) == ["epoch-0_step-20"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), RuntimeError("Python ends")])
def test_what_fails_is_journaled_and_the_next_save_tries_again(
    job: JobDirectory, retainer: Retainer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    make(job, 10, 20)
    with monkeypatch.context() as patch:
        patch.setattr(retainers, "prune", fail)
        retainer.after_save()
        retainer.finish(never)
        retainer.make_room()
    assert events(job) == [("prune_failed", None)] * 2
    retainer.after_save()
    retainer.finish(never)
    assert names(job) == ["epoch-0_step-20"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_unexpected_error_does_not_stop_later_passes(
    job: JobDirectory, retainer: Retainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("unforeseen")

    make(job, 10, 20)
    with monkeypatch.context() as patch:
        patch.setattr(retainers, "prune", fail)
        retainer.after_save()
        retainer.finish(never)
    retainer.after_save()
    retainer.finish(never)
    assert names(job) == ["epoch-0_step-20"]


def test_what_cannot_be_removed_is_journaled_with_the_reason(
    job: JobDirectory, retainer: Retainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename: Callable[..., None] = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(target).parent == job.trash:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        rename(source, target)

    make(job, 10, 20)
    monkeypatch.setattr(os, "rename", refuse)
    retainer.make_room()
    [event] = read_journal(job)
    assert event.name == "prune_failed"
    assert event.data["error"] == f"cannot be removed: {os.strerror(errno.EACCES)}"


ENDS_MEANWHILE = """
import sys, time
from pathlib import Path
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.checkpoint.prune import Retainer

job = JobDirectory(Path(sys.argv[1]))
retainer = Retainer(job, Journal(job, "here"), print)
retainer.rule = Retention(last=1)
retainer.after_save()
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.03])
def test_process_end_during_a_pass_is_harmless(job: JobDirectory, seconds: float) -> None:
    """The thread is cut off in the midst of a large file; no traceback of it is seen."""
    large = {"modeling/model.bin": b"x" * (96 * 1024 * 1024)}
    make_checkpoint(job, 10)
    make_checkpoint(job, 20, contents=large, world_size=1)
    done = subprocess.run(
        [sys.executable, "-c", ENDS_MEANWHILE, str(job.root), str(seconds)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert names(job)[0] == "epoch-0_step-20"
