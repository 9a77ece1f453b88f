"""Retention on the disk: what never goes, and that nothing is ever half gone."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint import prune as pruning
from elastic_ckpt.checkpoint.catalog import newest_intact, scan
from elastic_ckpt.checkpoint.cleanup import recover
from elastic_ckpt.checkpoint.manifest import FORMAT
from elastic_ckpt.checkpoint.ownership.read_lock import ReadLock
from elastic_ckpt.checkpoint.prune import Pruned, prune
from elastic_ckpt.checkpoint.quarantine import set_aside
from elastic_ckpt.checkpoint.verify import (
    MANIFEST_NAME,
    is_verified,
    mark_verified,
    read_manifest,
    verify_full,
)
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.retention import Retention
from tests.checkpoints import (
    MODEL,
    change_manifest,
    flip_bit,
    make_checkpoint,
    open_job,
    read_locked_elsewhere,
    tree,
)

LAST = Retention(last=1)


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


def make(job: JobDirectory, *steps: int) -> None:
    for step in steps:
        make_checkpoint(job, step)


def steps_of(job: JobDirectory) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in scan(job)]


def why(done: list[Pruned]) -> dict[int, str]:
    return {one.step: one.why for one in done if one.keep}


def mark(job: JobDirectory, step: int) -> None:
    path = job.checkpoint(0, step)
    mark_verified(job, path, verify_full(path))


# -- what goes --------------------------------------------------------------------------------


def test_what_no_rule_keeps_is_deleted_and_the_rest_is_whole(job: JobDirectory) -> None:
    make(job, 9, 10, 11, 20)
    done = prune(job, Retention(last=2))
    assert [(one.step, one.keep) for one in done] == [
        (20, True), (11, True), (10, False), (9, False),
    ]  # fmt: skip
    assert steps_of(job) == [20, 11]
    assert list(job.trash.iterdir()) == []
    for path in scan(job):
        verify_full(path)
    assert all(one.bytes > 500 and not one.failed for one in done)


def test_no_rule_deletes_nothing_and_reads_nothing(job: JobDirectory) -> None:
    make(job, 10, 20)
    before = tree(job.root)
    assert all(one.keep for one in prune(job, Retention()))
    assert tree(job.root) == before


def test_pruning_again_changes_nothing(job: JobDirectory) -> None:
    make(job, 10, 20, 30)
    prune(job, LAST)
    before = tree(job.root)
    assert all(one.keep for one in prune(job, LAST))
    assert tree(job.root) == before


def test_the_best_is_found_by_what_the_manifests_say(job: JobDirectory) -> None:
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
        make_checkpoint(job, step, metrics={"loss": loss})
    make(job, 40)
    prune(job, Retention(best=1, metric="loss"))
    assert steps_of(job) == [40, 20]


def test_steps_are_numbers_and_epochs_go_before_them(job: JobDirectory) -> None:
    """9 < 10, and the tenth epoch is behind the ninth whatever the steps are."""
    make_checkpoint(job, 9, epoch=9)
    make_checkpoint(job, 10, epoch=9)
    make_checkpoint(job, 8, epoch=10)
    assert [one.step for one in prune(job, LAST) if one.keep] == [8]


def test_no_clock_has_a_say(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files' times and the time of day jump back and forth; the choice stays."""
    make(job, 8, 9, 10, 11, 100)
    for jump in range(3):
        random_times = random.Random(jump)
        for path in job.root.rglob("*"):
            stamp = random_times.uniform(0, 4e9)
            os.utime(path, (stamp, stamp))
        now = random_times.uniform(0, 4e9)
        monkeypatch.setattr(time, "time", lambda now=now: now)
        newest = newest_intact(job)
        assert newest is not None and newest.step == 100
        done = prune(job, Retention(last=2, every=9), dry_run=True)
        assert [one.step for one in done if one.keep] == [100, 11, 9]


# -- what never goes --------------------------------------------------------------------------


def test_the_newest_is_verified_before_anything_goes(job: JobDirectory) -> None:
    """It alone is read, and it is remembered that it was."""
    make(job, 10, 20, 30)
    watched: list[str] = []

    def watch(what: str, total: int) -> Callable[[int], None]:
        watched.append(what)
        return lambda _: None

    prune(job, LAST, watch=watch)
    assert steps_of(job) == [30]
    path = job.checkpoint(0, 30)
    assert is_verified(job, path, read_manifest(path))
    make(job, 40)
    prune(job, LAST, watch=watch)
    assert watched == ["verifying epoch-0_step-30"]


def test_the_newest_that_was_verified_stays_though_it_is_older_than_the_rule_keeps(
    job: JobDirectory,
) -> None:
    make(job, 10, 20, 30, 40)
    mark(job, 20)
    done = prune(job, LAST)
    assert why(done) == {40: "the newest", 20: "the newest verified one"}
    assert steps_of(job) == [40, 20]


def test_a_newest_that_fails_its_verification_does_not_stand_for_the_others(
    job: JobDirectory,
) -> None:
    make(job, 10, 20, 30)
    flip_bit(job.checkpoint(0, 30) / MODEL)
    prune(job, LAST)
    assert steps_of(job) == [30, 20]


def test_nothing_goes_if_none_can_be_verified(job: JobDirectory) -> None:
    make(job, 10, 20, 30)
    for path in scan(job):
        flip_bit(path / MODEL)
    done = prune(job, LAST)
    assert steps_of(job) == [30, 20, 10]
    assert set(why(done).values()) == {"no checkpoint could be verified: nothing is deleted"}


def test_a_disk_that_cannot_be_read_verifies_nothing(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(job, 10, 20)

    def broken(path: Path, advance: object = None) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(pruning, "verify_full", broken)
    prune(job, LAST)
    assert steps_of(job) == [20, 10]


def test_a_namesake_of_what_was_verified_is_not_verified(job: JobDirectory) -> None:
    """The mark is of one attempt; another one under the same name has yet to be read."""
    make(job, 10, 20)
    mark(job, 20)
    shutil.rmtree(job.checkpoint(0, 20))
    make(job, 20)
    flip_bit(job.checkpoint(0, 20) / MODEL)
    prune(job, LAST)
    assert steps_of(job) == [20, 10]


def test_a_verified_one_that_lost_a_file_is_no_support(job: JobDirectory) -> None:
    make(job, 10, 20, 30)
    mark(job, 20)
    (job.checkpoint(0, 20) / MODEL).unlink()
    flip_bit(job.checkpoint(0, 30) / MODEL)
    prune(job, LAST)
    assert steps_of(job) == [30, 20, 10]


def test_what_was_set_aside_and_put_back_counts_as_never_verified(job: JobDirectory) -> None:
    make(job, 10, 20)
    mark(job, 20)
    there = set_aside(job, job.checkpoint(0, 20), "a test")
    there.rename(job.checkpoint(0, 20))
    flip_bit(job.checkpoint(0, 20) / MODEL)
    prune(job, LAST)
    assert steps_of(job) == [20, 10]


def test_what_is_not_ours_or_not_valid_is_left_alone(job: JobDirectory, tmp_path: Path) -> None:
    """Unsealed, damaged, of a newer format, a link, a file, in quarantine, of another name."""
    make(job, 1, 2, 3, 4, 5, 6, 7, 50, 60)
    (job.checkpoint(0, 1) / MANIFEST_NAME).unlink()
    (job.checkpoint(0, 2) / MODEL).unlink()
    change_manifest(job.checkpoint(0, 3), format=FORMAT + 1)
    job.checkpoint(0, 4).rename(tmp_path / "elsewhere")
    job.checkpoint(0, 4).symlink_to(tmp_path / "elsewhere")
    shutil.rmtree(job.checkpoint(0, 5))
    job.checkpoint(0, 5).write_bytes(b"a file")
    set_aside(job, job.checkpoint(0, 6), "a test")
    job.checkpoint(0, 7).rename(job.root / "best")
    (job.root / "notes").write_bytes(b"mine")
    before = tree(job.root)
    done = prune(job, LAST)
    assert [one.path.name for one in done if not one.keep] == ["epoch-0_step-50"]
    after = tree(job.root)
    gone = before.keys() - after.keys()
    assert gone and all(name.startswith("epoch-0_step-50") for name in gone)
    assert verify_full(tmp_path / "elsewhere")


def test_one_that_another_process_has_open_stays_until_that_one_ends(job: JobDirectory) -> None:
    """A killed reader blocks no one."""
    make(job, 10, 20, 30)
    with read_locked_elsewhere(job.checkpoint(0, 10)) as reader:
        done = prune(job, LAST)
        assert why(done)[10] == "it is open" and not done[-1].failed
        assert steps_of(job) == [30, 10]
        reader.kill()
        reader.wait()
        prune(job, LAST)
        assert steps_of(job) == [30]


def test_a_file_system_without_locks_keeps_everything(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers go on there, unseen."""
    make(job, 10, 20)

    def missing(fd: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", missing)
    lock = ReadLock(job.checkpoint(0, 10))
    done = prune(job, LAST)
    lock.release()
    assert why(done)[10].startswith("the file system has no locks")
    assert steps_of(job) == [20, 10]


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_checkpoint_that_took_the_place_of_another_is_not_deleted_in_its_stead(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    """Another process deletes and recreates it between the look and the lock."""
    make(job, 10, 20)
    flock = fcntl.flock

    def replace_first(fd: int, kind: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        shutil.rmtree(job.checkpoint(0, 10))
        make(job, 10)
        flock(fd, kind)

    monkeypatch.setattr(fcntl, "flock", replace_first)
    done = prune(job, LAST, dry_run=dry_run)
    assert why(done)[10] == "it is another one by now"
    verify_full(job.checkpoint(0, 10))


def test_what_cannot_be_removed_is_named_with_the_reason_and_stays_whole(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(job, 10, 20)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(target).parent == job.trash:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    done = prune(job, LAST)
    assert done[-1].failed and done[-1].keep
    assert done[-1].why == f"cannot be removed: {os.strerror(errno.EROFS)}"
    verify_full(job.checkpoint(0, 10))


@pytest.mark.parametrize("what", ["link", "file"])
def test_a_trash_that_is_no_directory_is_not_used(
    job: JobDirectory, tmp_path: Path, what: str
) -> None:
    """What a link leads to is not ours to empty."""
    make(job, 10, 20)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "epoch-0_step-1-0123abcd").mkdir(parents=True)
    job.trash.rmdir()
    if what == "link":
        job.trash.symlink_to(elsewhere)
    else:
        job.trash.write_bytes(b"")
    assert prune(job, LAST)[-1].failed
    assert steps_of(job) == [20, 10]
    assert [path.name for path in elsewhere.iterdir()] == ["epoch-0_step-1-0123abcd"]


# -- a dry run --------------------------------------------------------------------------------


def test_dry_run_lists_deletions_and_changes_nothing(job: JobDirectory) -> None:
    make(job, 10, 20, 30)
    before = tree(job.root)
    with read_locked_elsewhere(job.checkpoint(0, 10)):
        done = prune(job, LAST, dry_run=True)
    assert [(one.step, one.keep, one.why) for one in done] == [
        (30, True, "the newest"),
        (20, False, "no rule keeps it"),
        (10, True, "it is open"),
    ]
    assert tree(job.root) == before


def test_a_dry_run_leaves_the_trash(job: JobDirectory) -> None:
    make(job, 10, 20)
    job.checkpoint(0, 10).rename(job.trash / "epoch-0_step-10-0123abcd")
    prune(job, LAST, dry_run=True)
    assert len(list(job.trash.iterdir())) == 1


# -- kills ------------------------------------------------------------------------------------

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "open"}


def killed_at(call: Callable[[], object], count: int) -> bool:
    """Run a call in a child that is killed before it makes its n-th change; False if it ends."""
    pid = os.fork()
    if pid == 0:
        left = count

        def look(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event not in CHANGES:
                return
            if event == "open" and not int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):  # type: ignore[call-overload]
                return
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(look)
        try:
            call()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_point_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    """All that a restart could choose is intact, and the next start removes the rest."""
    template = open_job(tmp_path / "template")
    make(template, 10, 20, 30)
    survivors: set[tuple[int, ...]] = set()
    for count in range(1, 1000):
        job = JobDirectory(tmp_path / "job")
        shutil.copytree(template.root, job.root)
        killed = killed_at(lambda job=job: prune(job, LAST), count)
        for path in scan(job):
            verify_full(path)
        assert 30 in steps_of(job)
        recover(job)
        assert list(job.trash.iterdir()) == []
        survivors.add(tuple(steps_of(job)))
        prune(job, LAST)
        assert steps_of(job) == [30]
        shutil.rmtree(job.root)
        if not killed:
            break
    assert not killed and count > 20
    assert survivors == {(30, 20, 10), (30, 10), (30,)}


def test_a_start_in_a_hurry_leaves_the_trash_to_the_next_one(job: JobDirectory) -> None:
    make(job, 10, 20)
    for step in (10, 20):
        job.checkpoint(0, step).rename(job.trash / f"epoch-0_step-{step}-0123abcd")
    recover(job, hurry=lambda: True)
    assert len(list(job.trash.iterdir())) == 2
    recover(job)
    assert list(job.trash.iterdir()) == []


def test_what_others_put_into_the_trash_stays(job: JobDirectory, tmp_path: Path) -> None:
    """Names that are none of ours, files, and links, which are not followed."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"")
    (job.trash / "epoch-0_step-1-0123abcd").symlink_to(tmp_path / "precious")
    (job.trash / "epoch-0_step-2-0123abcd").write_bytes(b"")
    (job.trash / "mine").mkdir()
    recover(job)
    assert len(list(job.trash.iterdir())) == 3
    assert (tmp_path / "precious" / "file").exists()


# -- races ------------------------------------------------------------------------------------


def test_two_pruners_at_once_are_no_error_to_either(job: JobDirectory) -> None:
    """What one of them deleted, the other does not miss."""
    for _ in range(5):
        make(job, 10, 20, 30, 40)
        mark(job, 40)
        barrier = threading.Barrier(2)

        def run(barrier: threading.Barrier = barrier) -> list[Pruned]:
            barrier.wait(30)
            return prune(job, LAST)

        with ThreadPoolExecutor(2) as pool:
            both = [future.result(60) for future in [pool.submit(run), pool.submit(run)]]
        assert not any(one.failed for done in both for one in done)
        assert steps_of(job) == [40]
        assert list(job.trash.iterdir()) == []
        shutil.rmtree(job.checkpoint(0, 40))


@pytest.fixture
def readers() -> Iterator[list[threading.Thread]]:
    started: list[threading.Thread] = []
    yield started
    for thread in started:
        thread.join(60)


def test_nothing_disappears_under_a_reader(
    job: JobDirectory, readers: list[threading.Thread]
) -> None:
    """A lock that was granted holds the checkpoint whole; one that was not says so."""
    held: list[int] = []
    refused: list[int] = []
    wrong: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            for path in scan(job):
                try:
                    lock = ReadLock(path)
                except CheckpointRejected:
                    refused.append(1)
                    continue
                try:
                    verify_full(path)
                    held.append(1)
                except BaseException as error:
                    wrong.append(error)
                    stop.set()
                finally:
                    lock.release()

    for _ in range(3):
        readers.append(threading.Thread(target=read))
        readers[-1].start()
    try:
        for step in range(1, 25):
            make(job, step)
            prune(job, LAST)
    finally:
        stop.set()
    for reader in readers:
        reader.join(60)
    assert not wrong, wrong
    assert held
    mark(job, 24)
    prune(job, LAST)
    assert steps_of(job) == [24]


def test_prune_leaves_nothing_open(job: JobDirectory) -> None:
    make(job, 10, 20, 30)
    before = set(os.listdir("/proc/self/fd"))
    with read_locked_elsewhere(job.checkpoint(0, 20)):
        prune(job, LAST, dry_run=True)
        prune(job, LAST)
    assert set(os.listdir("/proc/self/fd")) == before
