"""The directory's thread: what it writes, and what becomes of it when the storage is unwell."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.ownership.fence import (
    Ownership,
    new_record,
    newest_number,
    read_beat,
)
from elastic_ckpt.checkpoint.ownership.job_lock import RunLocks
from elastic_ckpt.jobdir import runs_watch
from elastic_ckpt.jobdir.node_record import NodeRecord, ProcessIdentity, read_record
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.save_requests import RequestWatch, ask_for_save
from elastic_ckpt.journal.events import RunEnded
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.lease import BEAT_SECONDS
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.supervisor import job_files
from elastic_ckpt.supervisor.job_files import JobFiles
from elastic_ckpt.supervisor.ports import NO_CHECKPOINT, Key
from elastic_ckpt.supervisor.saves import checkpoints as places
from elastic_ckpt.supervisor.saves.own_watch import NoOwnSaves
from tests.checkpoints import make_checkpoint
from tests.waiting import until

PATIENCE = 20.0


def within(seconds: float) -> Callable[[], float]:
    limit = time.monotonic() + seconds
    return lambda: limit - time.monotonic()


@pytest.fixture
def lines() -> list[str]:
    """What the user was shown."""
    return []


@pytest.fixture
def beat_seconds() -> float:
    return BEAT_SECONDS


@pytest.fixture
def files(job: JobDirectory, lines: list[str], beat_seconds: float) -> Iterator[JobFiles]:
    locks, journal = RunLocks(job, "here", "run"), Journal(job, "here")
    found = JobFiles(
        job, "here", locks, journal, lines.append, lambda: None, NoOwnSaves(),
        beat_seconds=beat_seconds,
    )  # fmt: skip
    found.start()
    yield found
    found.close(within(PATIENCE))


def record(message: str) -> NodeRecord:
    return NodeRecord(
        job="job", run_id="run", node="here", owner=ProcessIdentity.current(), since=1.0,
        state=RunState.RUNNING, message=message,
    )  # fmt: skip


def test_newest_of_several_records_is_on_disk(job: JobDirectory, files: JobFiles) -> None:
    for number in range(50):
        files.write_record(record(f"number {number}"))

    def is_last() -> bool:
        found = read_record(job.node_record("here"))
        return found is not None and found.message == "number 49"

    until(is_last)


def test_scan_finds_what_was_sealed(job: JobDirectory, files: JobFiles) -> None:
    assert files.scan_now(within(PATIENCE)) == NO_CHECKPOINT
    make_checkpoint(job, 7)
    assert files.newest() == NO_CHECKPOINT  # as of the last scan
    found = files.scan_now(within(PATIENCE))
    assert found is not None and found[-1] == 7 and files.newest() == found


def test_scan_of_an_event_does_not_undo_the_one_that_is_waited_for(
    job: JobDirectory, files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drain's event has the thread scan once more, before the loop looks what its own scan found:
    that had the storage not answer, and a run that was saved said 76."""
    make_checkpoint(job, 7)
    within_of_files, began, ends = files._within, threading.Event(), threading.Event()

    def newest() -> Key:
        began.set()
        assert ends.wait(PATIENCE)
        raise OSError

    def wait(work: Callable[[], None], left: Callable[[], float]) -> bool:
        done = within_of_files(work, left)
        monkeypatch.setattr(files._checkpoints, "newest", newest)
        files.scan()
        assert began.wait(PATIENCE)
        return done

    monkeypatch.setattr(files, "_within", wait)
    found = files.scan_now(within(PATIENCE))
    ends.set()
    assert found is not None and found[-1] == 7


def test_save_request_is_taken_once(job: JobDirectory, files: JobFiles) -> None:
    request = ask_for_save(job)
    until(files.take_save_request)
    until(lambda: not request.exists())
    assert not files.take_save_request()


def test_request_that_cannot_be_removed_is_taken_once(
    job: JobDirectory, files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_files, "remove_requests", lambda job, names: None)
    ask_for_save(job)
    until(files.take_save_request)
    files.catch_up(within(PATIENCE))  # the thread has looked again
    assert not files.take_save_request()


def test_node_that_does_not_serve_a_request_leaves_it(
    job: JobDirectory, files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All nodes of a job look into the same directory."""
    seen: list[frozenset[str]] = []

    real = job_files.RequestWatch.look

    def look(watch: RequestWatch, now: float) -> frozenset[str]:
        seen.append(real(watch, now))
        return seen[-1]

    monkeypatch.setattr(job_files.RequestWatch, "look", look)
    request = ask_for_save(job)
    until(lambda: seen.count({request.name}) > 2)
    assert request.exists()
    until(files.take_save_request)


def test_storage_that_hangs_is_waited_for_within_the_bound(
    files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    monkeypatch.setattr(places, "newest_of_job", lambda job: answer.wait(PATIENCE) and None)
    try:
        assert files.scan_now(within(0.05)) is None
        files.write_record(record("nothing waits for this"))
        assert not files.take_save_request()
    finally:
        answer.set()


def test_fall_back_sets_the_newest_aside(job: JobDirectory, files: JobFiles) -> None:
    newest, older = make_checkpoint(job, 7), make_checkpoint(job, 5)
    forgotten: list[Key] = []
    files.fall_back("step 8 failed twice", lambda key: forgotten.append(key) is None, "")
    until(lambda: files.fallen_back is not None)
    assert files.fallen_back == (
        f"step 8 failed twice: setting {newest.name} aside, resuming from {older.name}"
    )
    assert [key[-2:] for key in forgotten] == [(0, 7)]
    assert not newest.exists() and older.exists()
    assert files.newest()[-2:] == (0, 5) and not files.cancel_fall_back()


def test_fall_back_does_not_happen_after_it_was_given_up(
    job: JobDirectory, files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever gave up may have launched from that checkpoint meanwhile."""
    newest = make_checkpoint(job, 7)
    make_checkpoint(job, 5)
    answer, look = threading.Event(), places.newest_two_intact

    def late(job: JobDirectory) -> tuple[Path, Path] | None:
        answer.wait(PATIENCE)
        return look(job)

    monkeypatch.setattr(places, "newest_two_intact", late)
    files.fall_back("step 8 failed twice", lambda key: pytest.fail("it was cancelled"), "")
    assert files.fallen_back is None
    assert files.cancel_fall_back()
    answer.set()
    until(lambda: files.fallen_back == "")
    assert newest.exists()


def take_over(job: JobDirectory) -> int:
    """Take the job over as another host would, and return the number."""
    number = newest_number(job) + 1
    Ownership.claim(job, number, new_record(job, "there", "other", "", None))
    return number


def test_fall_back_leaves_what_another_run_has_sealed(
    job: JobDirectory, files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host was suspended between the failure and the fall-back, and taken over meanwhile."""
    make_checkpoint(job, 5)
    newest = make_checkpoint(job, 7, run=take_over(job))
    files.fall_back("step 8 failed twice", lambda key: True, "")
    until(lambda: files.fallen_back == "")
    assert newest.exists()
    until(lambda: "has taken over" in files.lost)
    monkeypatch.setattr(Ownership, "check", lambda self: None)  # it was taken over behind that
    files.fall_back("step 8 failed twice", lambda key: True, "")
    until(lambda: files.fallen_back == "")
    assert newest.exists()


def test_scan_at_the_end_finds_that_the_job_was_taken_over(
    job: JobDirectory, files: JobFiles
) -> None:
    """Else a run would call another one's checkpoint its own, until its next beat."""
    take_over(job)
    assert files.scan_now(within(PATIENCE)) is not None
    assert "has taken over" in files.lost


def test_run_that_is_taken_over_during_its_last_scan_finds_out(
    job: JobDirectory, files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What that scan has found may be the other run's."""

    def look(job: JobDirectory) -> None:
        monkeypatch.undo()
        take_over(job)

    monkeypatch.setattr("elastic_ckpt.supervisor.saves.checkpoints.newest_of_job", look)
    assert files.scan_now(within(5.0)) is not None
    assert "has taken over" in files.lost


def test_clean_up_finds_that_the_job_was_taken_over(job: JobDirectory, files: JobFiles) -> None:
    take_over(job)
    files.clean_up(lambda: False, "")
    until(lambda: files.cleaned)
    assert "has taken over" in files.lost


def test_fall_back_that_has_begun_is_not_given_up(
    job: JobDirectory, files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = make_checkpoint(job, 7)
    make_checkpoint(job, 5)
    moving, answer = threading.Event(), threading.Event()

    def forget(key: Key) -> bool:
        moving.set()
        return answer.wait(PATIENCE)

    files.fall_back("step 8 failed twice", forget, "")
    assert moving.wait(PATIENCE)
    assert not files.cancel_fall_back()
    answer.set()
    until(lambda: bool(files.fallen_back))
    assert not newest.exists()


def test_identity_is_waited_for_within_the_bound_and_read_once(
    job: JobDirectory, files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, reads = threading.Event(), []

    def late(self: JobDirectory) -> str:
        reads.append(self)
        answer.wait(PATIENCE)
        return "f00d"

    monkeypatch.setattr(JobDirectory, "known_identity", late)
    try:
        assert [files.known_identities(0.01) for _ in range(5)] == [None] * 5
    finally:
        answer.set()
    found = files.known_identities(PATIENCE)
    assert found is not None and [one.partition(".")[0] for one in found] == ["f00d"]
    assert len(reads) == 1


@pytest.mark.parametrize("error", [OSError(5, "I/O error"), ValueError("odd")])
def test_thread_survives_errors_and_a_failed_scan_is_no_answer(
    job: JobDirectory, files: JobFiles, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    make_checkpoint(job, 7)
    with monkeypatch.context() as broken:
        broken.setattr(places, "newest_of_job", lambda job: (_ for _ in ()).throw(error))
        assert files.scan_now(within(PATIENCE)) is None
    found = files.scan_now(within(PATIENCE))
    assert found is not None and found[-1] == 7


def test_wait_ends_when_there_is_less_time(
    job: JobDirectory, files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notice during the wait for storage that hangs shortens it."""
    answers, asked = threading.Event(), 0
    monkeypatch.setattr(places, "newest_of_job", lambda job: answers.wait(PATIENCE))

    def left() -> float:
        nonlocal asked
        asked += 1
        return PATIENCE if asked < 3 else 0.0

    began = time.monotonic()
    assert files.scan_now(left) is None
    assert time.monotonic() - began < PATIENCE / 2
    answers.set()
    monkeypatch.undo()


def test_directory_that_is_moved_away_is_reported_and_made_again(
    job: JobDirectory, files: JobFiles, lines: list[str]
) -> None:
    files.write_record(record("training"))
    identity = files.identity()
    make_checkpoint(job, 7)
    before = files.scan_now(within(PATIENCE))
    old = job.root.rename(job.root.with_name("archive"))
    assert files.scan_now(within(PATIENCE)) == NO_CHECKPOINT
    assert files.left_behind == before
    assert [line for line in lines if "was moved, deleted or unmounted" in line] == lines
    assert files.identity() == identity  # as the memory tier is found by it
    found = read_record(job.node_record("here"))
    assert found is not None and found.message == "training"
    shutil.rmtree(job.root)
    old.rename(job.root)
    assert files.scan_now(within(PATIENCE)) == before
    assert files.left_behind is None
    assert lines[-1] == f"{job.root} is again the directory in which this run started"


def test_directory_that_was_restored_with_its_content_is_called_a_copy(
    job: JobDirectory, files: JobFiles, lines: list[str]
) -> None:
    make_checkpoint(job, 7)
    before = files.scan_now(within(PATIENCE))
    archive = job.root.rename(job.root.with_name("archive"))
    shutil.copytree(archive, job.root)
    assert files.scan_now(within(PATIENCE)) == before
    [line] = lines
    assert line.startswith(f"{job.root} was replaced while the job runs, by a copy of its own")
    shutil.rmtree(job.root)
    archive.rename(job.root)
    assert files.scan_now(within(PATIENCE)) == before
    assert lines[1:] == [f"{job.root} is again the directory in which this run started"]


def test_deleted_control_files_are_written_again(
    job: JobDirectory, files: JobFiles, lines: list[str]
) -> None:
    files.write_record(record("training"))
    assert files.identity()
    make_checkpoint(job, 7)
    before = files.scan_now(within(PATIENCE))
    shutil.rmtree(job.control)
    assert files.scan_now(within(PATIENCE)) == before
    assert files.left_behind is None and len(lines) == 1 and str(job.control) in lines[0]
    assert read_record(job.node_record("here")) is not None


def calm(job: JobDirectory) -> None:
    """Wait until a run's thread has found nothing for some beats, so that it looks briefly."""
    beats: set[bytes] = set()

    def have_come() -> bool:
        beats.add(read_beat(job, 1))
        return len(beats) > 10

    until(have_come)


@pytest.mark.parametrize("beat_seconds", [0.02])  # it beats all the time
def test_run_that_is_taken_over_finds_out_at_its_next_beat(
    job: JobDirectory, files: JobFiles
) -> None:
    calm(job)
    assert not files.lost
    take_over(job)
    until(lambda: "has taken over" in files.lost)


@pytest.mark.parametrize("beat_seconds", [0.02])  # it beats all the time
def test_directory_that_is_moved_is_noticed_at_the_next_beat(
    job: JobDirectory, files: JobFiles, lines: list[str]
) -> None:
    calm(job)
    job.root.rename(job.root.with_name("archive"))
    until(lambda: "was moved, deleted or unmounted" in "".join(lines))
    until(lambda: newest_number(job) == 1)
    calm(job)
    assert len(lines) == 1 and not files.lost


@pytest.mark.parametrize("beat_seconds", [0.02])  # it beats all the time
def test_record_that_was_removed_is_written_again_at_the_next_beat(
    job: JobDirectory, files: JobFiles
) -> None:
    calm(job)
    for path in list(job.runs.iterdir()):
        path.unlink()
    until(lambda: newest_number(job) == 1)
    calm(job)
    assert not files.lost


@pytest.mark.parametrize("beat_seconds", [0.02])  # it beats all the time
def test_run_is_told_of_a_newer_one_where_directories_have_no_times(
    job: JobDirectory, files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_watch, "stamp_of", lambda directory: (1,))
    files._locks.ownership.shows_changes = False  # as its claim finds it there
    calm(job)
    take_over(job)
    until(lambda: "has taken over" in files.lost)


def test_journal_of_this_host_is_read_soon_and_once(
    job: JobDirectory, files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its directory has been moved away meanwhile, and made again."""
    journal = Journal(job, "here")
    found: list[object] = []

    def has(number: int) -> bool:
        found.extend(entry.event for entry in files.events())
        return len(found) >= number

    for number in (1, 2):
        journal.write(RunEnded(state="ended", exit_code=0, message=str(number)))
        until(lambda number=number: has(number))
    job.root.rename(job.root.with_name("archive"))
    files.scan_now(within(PATIENCE))
    journal.write(RunEnded(state="ended", exit_code=0, message="3"))
    until(lambda: has(3))
    assert len(found) == 3
