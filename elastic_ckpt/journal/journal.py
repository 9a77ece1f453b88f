"""The journal: one line of JSON per event, appended with a single write.

An append of one line is atomic among the processes of one host; each node has a file of its
own because it is not between hosts. A torn last line, from a full disk or a power cut, is
skipped on reading.

::

    .elastic-ckpt/journal/node0.jsonl      what happened on node0
                          node0.jsonl.1    before that; .2 and .3 are older still
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.events import JournalEvent, RunStarted
from elastic_ckpt.journal.line import MAX_LINE_BYTES, JournalEntry, decode_line, encode_line
from elastic_ckpt.util.files import create_file, open_regular, read_tail

MAX_TAIL_BYTES: Final = 1024 * 1024
"""Read at a time by who follows a journal; the rest comes the next time."""

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
KEPT_FILES: Final = 3
"""Older ones of a node, besides the one that is written."""

MAX_READ_BYTES: Final = 64 * 1024 * 1024
MAX_EVENTS: Final = 250_000
"""Of longer journals, and of those that somebody else put there, the end is read."""

_MAX_FILES: Final = 4096
_MARK: Final = b'{"event":"steps",'
_LAST_MARKS: Final = 64
_MAX_WAITING: Final = 4096
PATIENCE_SECONDS: Final = 0.25
"""How long who writes an event waits for the disk to take it."""

CLOCK_STEP_SECONDS: Final = 1.0
"""By which the two clocks may drift apart within a run before one of them was set."""


class Journal:
    """A node's journal. Writing never raises: a full disk must not stop the training.

    Nor does a disk that does not answer: a thread appends, and who writes waits for it
    ``PATIENCE_SECONDS`` at most, and not at all before it has caught up.

    Attributes:
        incarnation: stands in each event from now on.
    """

    def __init__(
        self,
        job: JobDirectory,
        node: str,
        *,
        follows: bool = False,
        rank: int = -1,
        incarnation: int = 0,
        rotates: bool = False,
    ) -> None:
        """
        Args:
            follows: another node leads; what is counted is counted there.
            rotates: begin a new file when this one is long; one process of a node at a time.
        """
        self._file = _File(job, job.journal(node), rotates=rotates)
        self._node = node
        self._rank = rank
        self.incarnation = incarnation
        self._follows = follows
        self._writer = _Writer(self._file.append)

    def write(self, event: JournalEvent) -> None:
        """Append one event."""
        self._writer.put(self._line(event), wait=True)

    def note(self, event: JournalEvent) -> None:
        """Append one event soon: for a caller without time, to whom its loss is small."""
        self._writer.put(self._line(event), wait=False)

    def _line(self, event: JournalEvent) -> bytes:
        entry = JournalEntry(
            event=replace(event, follows=True) if self._follows else event,
            wall=time.time(),
            monotonic=time.monotonic(),
            node=self._node,
            pid=os.getpid(),
            rank=self._rank,
            incarnation=self.incarnation,
        )
        # The newline in front keeps a line that a full disk tore from taking this one with it.
        return b"\n" + encode_line(entry) + b"\n"


class _Writer:
    """Calls ``append`` in a thread of its own, which begins with the first line."""

    def __init__(self, append: Callable[[bytes], None]) -> None:
        self._append = append
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lines: deque[bytes] = deque(maxlen=_MAX_WAITING)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._written = self._given = 0
        self._late = False

    def put(self, line: bytes, *, wait: bool) -> None:
        """Have it appended; with ``wait`` back when it is, or when that takes too long."""
        if self._pid != os.getpid():  # a fork has no thread, and maybe a lock that nobody frees
            self._reset()
        with self._changed:
            if self._thread is None and not self._begin():
                self._append(line)
                return
            self._lines.append(line)
            self._given += 1
            mine = self._given
            self._changed.notify_all()
            if wait and not self._late:
                done = self._changed.wait_for(lambda: self._written >= mine, PATIENCE_SECONDS)
                self._late = not done

    def _begin(self) -> bool:
        thread = threading.Thread(target=self._run, name="journal", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads, or no more time
            return False
        self._thread = thread
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                lines, given = list(self._lines), self._given
                self._lines.clear()
            for line in lines:
                with contextlib.suppress(Exception):  # one line less, and not all that follow
                    self._append(line)
            with self._changed:
                self._written = given
                self._late = False
                self._changed.notify_all()


class _File:
    """Where a node's lines go."""

    def __init__(self, job: JobDirectory, path: Path, *, rotates: bool) -> None:
        self._job = job
        self._path = path
        self._rotates = rotates

    def append(self, line: bytes) -> None:
        """One write; nothing if the disk does not take it."""
        with contextlib.suppress(OSError):
            if not self._job.owns(self._path.parent):
                return
            if self._rotates:
                self._rotate()
            self._write(line)

    def _write(self, line: bytes) -> None:
        with contextlib.suppress(FileExistsError):
            os.close(create_file(self._path))
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        fd = os.open(self._path, flags)
        try:
            status = os.fstat(fd)
            # A file with another name is somebody's who did not ask for our lines.
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                os.write(fd, line)
        finally:
            os.close(fd)

    def _rotate(self) -> None:
        """Begin a new file behind a long one; who has the old one open still writes there."""
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self._path, follow_symlinks=False).st_size < MAX_FILE_BYTES:
                return
            for number in range(KEPT_FILES, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(_older(self._path, number - 1), _older(self._path, number))


def _older(path: Path, number: int) -> Path:
    """The file that came so many files before the one that is written."""
    return path.with_name(f"{path.name}.{number}") if number else path


class JournalTail:
    """What is appended to a node's journal from now on, each event once, in order."""

    def __init__(self, job: JobDirectory, node: str) -> None:
        self._job = job
        self._path = job.journal(node)
        self._inode, self._offset = self._look()

    def read(self) -> list[JournalEntry]:
        """The events since the last call; none while the disk does not answer.

        A line that is still being written comes the next time. Looking costs one system call as
        long as there is nothing new.
        """
        inode, size = self._look()
        if (inode, size) == (self._inode, self._offset):
            return []
        events: list[JournalEntry] = []
        if inode != self._inode or size < self._offset:
            events = self._rest_of_older()
            self._inode, self._offset = inode, 0
        data = self._read(self._path, self._offset)
        whole = data.rfind(b"\n") + 1
        if whole == 0 and len(data) == MAX_TAIL_BYTES:
            whole = len(data)  # no line of ours is that long
        self._offset += whole
        return events + list(_decode(data[:whole]))

    def _rest_of_older(self) -> list[JournalEntry]:
        """What came into the file that was read, until a new one was begun."""
        older = _older(self._path, 1)
        with contextlib.suppress(OSError):
            if os.stat(older, follow_symlinks=False).st_ino == self._inode:
                return list(_decode(self._read(older, self._offset)))
        return []

    def _look(self) -> tuple[int, int]:
        """Which file is being written, and how long it is."""
        try:
            found = os.stat(self._path, follow_symlinks=False)
        except OSError:
            return 0, 0
        return found.st_ino, found.st_size

    def _read(self, path: Path, offset: int) -> bytes:
        try:
            if not self._job.owns(path.parent):
                return b""
            with os.fdopen(open_regular(path), "rb") as file:
                file.seek(offset)
                return file.read(MAX_TAIL_BYTES)
        except OSError:
            return b""


def read_journal(job: JobDirectory, *, marks: bool = True) -> list[JournalEntry]:
    """All nodes' events, in order of time; unreadable lines are skipped.

    Within a run the monotonic clock tells the time: where somebody set the other one, ``wall`` is
    what it would have been.

    Args:
        marks: with all step marks, which are most of a long journal. Without, of those in a row
            the first and the last are read, and some more at a node's end: all that time and rate
            depend on.
    """
    events: deque[JournalEntry] = deque(maxlen=MAX_EVENTS)
    budget = MAX_READ_BYTES
    found = islice(job.found(job.control / "journal", "*.jsonl"), _MAX_FILES)
    for path in sorted(found):
        parts: list[bytes] = []
        for number in range(KEPT_FILES + 1):  # the newest first: it is what must not be missed
            parts.insert(0, read_tail(_older(path, number), budget))
            budget -= len(parts[0])
        events.extend(_steady(_decode(*parts, marks=marks)))
    return sorted(events, key=lambda event: event.wall)


def _steady(events: Iterable[JournalEntry]) -> Iterator[JournalEntry]:
    """One node's events, with times that go on as the monotonic clock does within each run."""
    start: JournalEntry | None = None
    for event in events:
        if (
            isinstance(event.event, RunStarted)
            or start is None
            or event.monotonic < start.monotonic
        ):
            start = event
        wall = start.wall + event.monotonic - start.monotonic
        if abs(wall - event.wall) > CLOCK_STEP_SECONDS:
            yield replace(event, wall=wall)
        else:
            yield event


def _lines(parts: Iterable[bytes], *, marks: bool) -> Iterator[bytes]:
    """One at a time: a list of very many is many times the size."""
    in_a_row: deque[bytes] = deque(maxlen=_LAST_MARKS)
    is_first = True
    for line in chain.from_iterable(map(io.BytesIO, parts)):
        if len(line) > MAX_LINE_BYTES + 1 or not line.strip():
            continue
        if not marks and line.startswith(_MARK):
            if is_first:
                yield line
            else:
                in_a_row.append(line)
            is_first = False
            continue
        if in_a_row:
            yield in_a_row.pop()
            in_a_row.clear()
        is_first = True
        yield line
    yield from in_a_row


def _decode(*parts: bytes, marks: bool = True) -> Iterator[JournalEntry]:
    for line in _lines(parts, marks=marks):
        entry = decode_line(line)
        if entry is not None:
            yield entry
