"""The journal never stops the training and loses no complete line."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal import journal as journals
from elastic_ckpt.journal.events import Crashed, RunStarted, Saved, StateChanged, StepMark, Unknown
from elastic_ckpt.journal.history import History
from elastic_ckpt.journal.journal import (
    MAX_LINE_BYTES,
    MAX_TAIL_BYTES,
    PATIENCE_SECONDS,
    Journal,
    JournalTail,
    read_journal,
)

WRITER = """
import sys
from pathlib import Path
from elastic_ckpt.journal.events import Unknown
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.jobdir.paths import JobDirectory

journal = Journal(JobDirectory(Path(sys.argv[1])), "here")
sys.stdin.read(1)
for number in range(int(sys.argv[2])):
    data = {"number": number, "filler": "x" * (number * 37 % 5000)}
    journal.write(Unknown(name="event", data=data))
"""


def names(job: JobDirectory) -> list[str]:
    return [event.name for event in read_journal(job)]


def test_events_are_read_as_written(job: JobDirectory) -> None:
    Journal(job, "here").write(Saved(step=10, reason="interval", bytes=None))
    [event] = read_journal(job)
    assert (event.name, event.node) == ("saved", "here")
    assert event.event == Saved(step=10, reason="interval", bytes=None)
    assert event.pid > 0 and event.wall > 1e9 and event.monotonic > 0


def test_journals_of_all_nodes_are_merged_by_time(job: JobDirectory) -> None:
    one, two = Journal(job, "one"), Journal(job, "two")
    for number in range(3):
        one.write(Unknown(name=f"one-{number}"))
        two.write(Unknown(name=f"two-{number}"))
    events = read_journal(job)
    assert len(events) == 6
    assert [event.wall for event in events] == sorted(event.wall for event in events)
    assert [event.name for event in events if event.node == "two"] == ["two-0", "two-1", "two-2"]


@pytest.mark.parametrize("lost", [1, 2, 20])
def test_torn_last_line_is_skipped(job: JobDirectory, lost: int) -> None:
    """A power cut loses the event that it tore; a missing newline alone loses nothing."""
    journal = Journal(job, "here")
    journal.write(Unknown(name="first"))
    journal.write(Unknown(name="second"))
    path = job.journal("here")
    path.write_bytes(path.read_bytes()[:-lost])
    assert names(job) == (["first", "second"] if lost == 1 else ["first"])


@pytest.mark.parametrize("lost", [1, 2, 20])
def test_event_after_a_torn_line_is_not_lost(job: JobDirectory, lost: int) -> None:
    journal = Journal(job, "here")
    journal.write(Unknown(name="first"))
    journal.write(Unknown(name="torn"))
    path = job.journal("here")
    path.write_bytes(path.read_bytes()[:-lost])
    journal.write(Unknown(name="third"))
    assert names(job) == (["first", "torn", "third"] if lost == 1 else ["first", "third"])


def test_invalid_lines_are_skipped(job: JobDirectory) -> None:
    journal = Journal(job, "here")
    journal.write(Unknown(name="first"))
    with job.journal("here").open("ab") as file:
        file.write(b'\n\0\0\0\n{"event": 3}\n[]\n\xff\xfe\n{"event": "no time"}\n')
    journal.write(Unknown(name="last"))
    assert names(job) == ["first", "last"]


def test_many_processes_append_whole_lines(job: JobDirectory) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(job.root), "150"], stdin=subprocess.PIPE
        )
        for _ in range(4)
    ]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"go")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    lines = job.journal("here").read_bytes().splitlines()
    assert len([line for line in lines if line]) == 600
    events = read_journal(job)
    assert len(events) == 600
    for writer in writers:
        numbers = [event.data["number"] for event in events if event.pid == writer.pid]
        assert sorted(numbers) == list(range(150))


def test_full_disk_never_raises(job: JobDirectory) -> None:
    job.journal("here").symlink_to("/dev/full")
    Journal(job, "here").write(Unknown(name="lost"))
    Journal(job, "there").write(Unknown(name="kept"))
    assert [event.name for event in read_journal(job)] == ["kept"]


@pytest.mark.parametrize("place", ["a directory", "below a file", "gone"])
def test_unwritable_journal_never_raises(job: JobDirectory, place: str) -> None:
    """Neither does a directory that was replaced or removed."""
    path = job.journal("here")
    if place == "a directory":
        path.mkdir()
    else:
        path.parent.rmdir()
        if place == "below a file":
            path.parent.write_bytes(b"")
    Journal(job, "here").write(Unknown(name="lost"))
    assert read_journal(job) == []


@pytest.mark.parametrize("value", ["caf\udce9", object(), 1 << 80], ids=["name", "object", "int"])
def test_data_that_json_cannot_hold_never_raises(job: JobDirectory, value: object) -> None:
    """A file name that is not UTF-8 in a message must not end the supervisor."""
    journal = Journal(job, "here")
    journal.write(Crashed(message=value))
    journal.write(Unknown(name="after"))
    assert names(job)[-1] == "after"


def test_long_event_is_cut_and_not_lost(job: JobDirectory) -> None:
    journal = Journal(job, "here")
    journal.write(Crashed(message="x" * (2 * MAX_LINE_BYTES)))
    journal.write(Unknown(name="after"))
    assert names(job) == ["crash", "after"]
    assert max(map(len, job.journal("here").read_bytes().splitlines())) <= MAX_LINE_BYTES


def new_names(tail: JournalTail) -> list[str]:
    return [event.name for event in tail.read()]


def test_tail_reads_each_new_event_once(job: JobDirectory) -> None:
    journal = Journal(job, "here")
    journal.write(Unknown(name="before"))
    tail = JournalTail(job, "here")
    assert new_names(tail) == []
    journal.write(Unknown(name="one"))
    journal.write(Unknown(name="two"))
    Journal(job, "there").write(Unknown(name="another node's"))
    assert new_names(tail) == ["one", "two"]
    assert new_names(tail) == []
    journal.write(Unknown(name="three"))
    assert new_names(tail) == ["three"]


def test_tail_may_be_older_than_its_journal(job: JobDirectory) -> None:
    tail = JournalTail(job, "here")
    assert new_names(tail) == []
    Journal(job, "here").write(Unknown(name="first"))
    assert new_names(tail) == ["first"]


def test_tail_waits_for_the_rest_of_a_line(job: JobDirectory) -> None:
    journal, path = Journal(job, "here"), job.journal("here")
    tail = JournalTail(job, "here")
    journal.write(Unknown(name="complete"))
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    assert new_names(tail) == []
    path.write_bytes(data)
    assert new_names(tail) == ["complete"]


def test_tail_restarts_with_a_shorter_journal(job: JobDirectory) -> None:
    journal, path = Journal(job, "here"), job.journal("here")
    journal.write(Unknown(name="long", data={"text": "x" * 1000}))
    tail = JournalTail(job, "here")
    path.unlink()
    journal.write(Unknown(name="new"))
    assert new_names(tail) == ["new"]


def test_tail_reads_in_pieces_and_skips_endless_lines(job: JobDirectory) -> None:
    journal, path = Journal(job, "here"), job.journal("here")
    tail = JournalTail(job, "here")
    count = 3 * MAX_TAIL_BYTES // 50_000
    for _ in range(count):
        journal.write(Unknown(name="event", data={"filler": "x" * 50_000}))
    with path.open("ab") as file:
        file.write(b"x" * (2 * MAX_TAIL_BYTES))
    journal.write(Unknown(name="last"))
    pieces = [new_names(tail) for _ in range(8)]
    assert [name for piece in pieces for name in piece] == ["event"] * count + ["last"]
    assert len([piece for piece in pieces if piece]) >= 4


@pytest.mark.parametrize("what", ["a link", "a directory", "a link above"])
def test_tail_follows_no_link(job: JobDirectory, tmp_path: Path, what: str) -> None:
    path = job.journal("here")
    other = tmp_path / "other"
    other.mkdir()
    Journal(job, "here").write(Unknown(name="foreign"))
    path.rename(other / path.name)
    tail = JournalTail(job, "here")
    if what == "a link":
        path.symlink_to(other / path.name)
    elif what == "a directory":
        path.mkdir()
    else:
        path.parent.rmdir()
        path.parent.symlink_to(other)
    assert new_names(tail) == []


def test_hanging_disk_delays_no_writer(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first write waits for its bound, the others do not; all are written in the end."""
    answers = threading.Event()
    write = os.write

    def hang(fd: int, data: bytes) -> int:
        assert b'{"event"' not in data or answers.wait(30)
        return write(fd, data)

    monkeypatch.setattr(os, "write", hang)
    journal = Journal(job, "here")
    began = time.monotonic()
    for number in range(200):
        journal.write(Unknown(name="event", data={"number": number}))
    assert time.monotonic() - began < 20 * PATIENCE_SECONDS
    assert read_journal(job) == []
    answers.set()
    journal.write(Unknown(name="last"))
    limit = time.monotonic() + 30
    while len(read_journal(job)) < 201 and time.monotonic() < limit:
        time.sleep(0.01)
    events = read_journal(job)
    assert [event.data.get("number") for event in events] == [*range(200), None]
    assert events[0].monotonic <= events[199].monotonic < began + 20 * PATIENCE_SECONDS


def test_forked_child_writes_its_own_events(job: JobDirectory) -> None:
    """The parent's thread does not exist in a worker of a DataLoader."""
    journal = Journal(job, "here")
    journal.write(Unknown(name="parent"))
    pid = os.fork()
    if pid == 0:
        try:
            journal.write(Unknown(name="child"))
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    events = read_journal(job)
    assert [(event.name, event.pid == pid) for event in events] == [
        ("parent", False), ("child", True),
    ]  # fmt: skip


def test_long_file_is_rotated(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reader and tail see each event once, in order; the oldest files are deleted."""
    monkeypatch.setattr(journals, "MAX_FILE_BYTES", 2000)
    journal = Journal(job, "here", rotates=True)
    other = Journal(job, "here")
    tail = JournalTail(job, "here")
    tailed = []
    for number in range(60):
        data = {"number": number, "filler": "x" * 100}
        (journal if number % 3 else other).write(Unknown(name="event", data=data))
        tailed += [event.data["number"] for event in tail.read()]
    assert tailed == list(range(60))
    kept = [event.data["number"] for event in read_journal(job)]
    assert 20 < len(kept) < 60 and kept == list(range(60))[-len(kept) :]
    names = sorted(path.name for path in job.journal("here").parent.iterdir())
    assert names == ["here.jsonl", "here.jsonl.1", "here.jsonl.2", "here.jsonl.3"]


def test_setting_the_clock_moves_no_event(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a run the monotonic clock counts; the next run starts with the new wall clock."""
    clock = [1000.0, 50.0]
    monkeypatch.setattr(journals.time, "time", lambda: clock[0])
    monkeypatch.setattr(journals.time, "monotonic", lambda: clock[1])
    journal = Journal(job, "here")
    for event, wall, monotonic in (
        ("start", 1000.0, 50.0),
        ("before", 1010.0, 60.0),
        ("after", 4620.0, 70.0),  # the clock was put an hour ahead
        ("end", 4630.0, 80.0),
        ("start", 4640.0, 90.0),
    ):
        clock[:] = [wall, monotonic]
        journal.write(Unknown(name=event) if event != "start" else RunStarted())
    assert [event.wall for event in read_journal(job)] == [1000.0, 1010.0, 1020.0, 1030.0, 4640.0]


def test_entries_of_a_follower_are_marked(job: JobDirectory) -> None:
    Journal(job, "leader").write(Saved(step=1))
    Journal(job, "follower", follows=True).write(Saved(step=1))
    assert [entry.event.follows for entry in read_journal(job)] == [False, True]


def test_entries_have_rank_and_incarnation(job: JobDirectory) -> None:
    journal = Journal(job, "here", rank=3, incarnation=2)
    journal.write(Unknown(name="one"))
    journal.incarnation = 4
    journal.note(Unknown(name="two"))
    journal.write(Unknown(name="three"))  # after the note
    found = [(one.name, one.rank, one.incarnation) for one in read_journal(job)]
    assert found == [("one", 3, 2), ("two", 3, 4), ("three", 3, 4)]


@pytest.mark.parametrize("rotates", [False, True])
def test_account_of_time_is_the_same_without_marks(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch, rotates: bool
) -> None:
    """The ends of consecutive marks are read: a killed run had trained until the last one."""
    if rotates:
        monkeypatch.setattr(journals, "MAX_FILE_BYTES", 10_000)
    journal = Journal(job, "here", rotates=rotates)

    def train(first: int, last: int) -> None:
        for step in range(first, last):
            journal.write(StepMark(step=step, metrics={'{"event":"steps",': 1.0}))

    journal.write(RunStarted())
    journal.write(StateChanged(state="running"))
    train(0, 40)
    journal.write(Saved(step=40, stall_seconds=0.0))
    train(40, 80)
    journal.write(RunStarted())  # it was killed
    journal.write(StateChanged(state="running"))
    train(40, 140)
    every, few = read_journal(job), read_journal(job, marks=False)
    assert len(few) < len(every) * 0.8
    assert [one for one in every if one.name != "steps"] == [
        one for one in few if one.name != "steps"
    ]
    assert few[-20:] == every[-20:]  # what the rate is made from
    assert History.of(few).account.goodput() == History.of(every).account.goodput()


def test_journal_writes_without_threads(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when Python exits, or at the user's limit of threads."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    Journal(job, "here").write(Unknown(name="alone"))
    monkeypatch.undo()
    assert names(job) == ["alone"]


def test_fork_while_the_disk_hangs_can_write(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, parent, write = threading.Event(), os.getpid(), os.write

    def hang(fd: int, data: bytes) -> int:
        if os.getpid() == parent and b'{"event"' in data:
            assert answers.wait(30)
        return write(fd, data)

    monkeypatch.setattr(os, "write", hang)
    journal = Journal(job, "here")
    journal.write(Unknown(name="parent"))
    pid = os.fork()
    if pid == 0:
        try:
            journal.write(Unknown(name="child"))
        finally:
            os._exit(0)
    limit = time.monotonic() + 20
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > limit:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            raise AssertionError("the child waits for a lock")
        time.sleep(0.01)
    assert names(job) == ["child"]
    answers.set()
    journal.write(Unknown(name="last"))
    while "last" not in names(job) and time.monotonic() < limit:
        time.sleep(0.01)
    assert names(job) == ["parent", "child", "last"]
