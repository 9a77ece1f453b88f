"""The journal: one line of JSON per event, appended with a single write.

Appending one line is atomic among the processes of a host, but not between hosts, so each node
has its own file. A line torn by a full disk or a power cut is skipped on reading.

::

    .elastic-ckpt/journal/node0.jsonl      what happened on node0
                          node0.jsonl.1    earlier; .2 and .3 are older still
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.events import JournalEvent, RunStarted
from elastic_ckpt.journal.line import MAX_LINE_BYTES, JournalEntry, decode_line, encode_line
from elastic_ckpt.util.files import open_regular, read_tail
from elastic_ckpt.util.jsonl import AppendedFile, LineWriter, older

MAX_TAIL_BYTES: Final = 1024 * 1024
"""That one call of ``JournalTail.read`` reads; the rest comes with the next call."""

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
AHEAD_BYTES: Final = 64 * 1024
"""Allocated beyond the end of a file: a full disk must not keep ``status`` from saying so."""

KEPT_FILES: Final = 3
"""Older files of a node, besides the one that is written."""

MAX_READ_BYTES: Final = 64 * 1024 * 1024
MAX_EVENTS: Final = 250_000
"""Of longer journals the end is read."""

_MAX_FILES: Final = 4096
_MARK: Final = b'{"event":"steps",'
_LAST_MARKS: Final = 64
_MAX_WAITING: Final = 4096
PATIENCE_SECONDS: Final = 0.25
"""How long :meth:`Journal.write` waits for the disk."""

CLOCK_STEP_SECONDS: Final = 1.0
"""If the two clocks differ by more within a run, one of them was set."""


class Journal:
    """A node's journal. Writing never raises: a full disk must not stop the training.

    Nor does a disk that hangs: a thread appends, for which a caller waits ``PATIENCE_SECONDS`` at
    most, and not at all while the thread is late.

    Attributes:
        incarnation: stands in each entry from now on.
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
            follows: another node leads the job, and what it journals counts.
            rotates: start a new file when this one is long; only one process of a node may.
        """
        path = job.journal(node)

        def check() -> None:
            if not job.owns(path.parent):
                raise NotADirectoryError(str(path.parent))

        # Closed after each line: another process may rotate the file, and other hosts read it.
        file = AppendedFile(
            path, check, limit=MAX_FILE_BYTES if rotates else None, rotations=KEPT_FILES,
            keeps_open=False, ahead=AHEAD_BYTES,
        )  # fmt: skip
        self._node = node
        self._rank = rank
        self.incarnation = incarnation
        self._follows = follows
        self._writer = LineWriter(
            "journal", file, wait_seconds=PATIENCE_SECONDS, max_waiting=_MAX_WAITING
        )

    def write(self, event: JournalEvent) -> None:
        """Append an event."""
        self._writer.put(self._line(event), wait=True)

    def note(self, event: JournalEvent) -> None:
        """Append an event soon, without waiting; it may be lost if the process is killed."""
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
        return encode_line(entry) + b"\n"


class JournalTail:
    """Follows a node's journal from its present end: each entry once, in order."""

    def __init__(self, job: JobDirectory, node: str) -> None:
        self._job = job
        self._path = job.journal(node)
        self._inode, self._offset = self._look()

    def read(self) -> list[JournalEntry]:
        """Return the entries since the last call; none if they cannot be read.

        A line that is still being written comes with the next call. A call costs one system call
        while there is nothing new.
        """
        inode, size = self._look()
        if (inode, size) == (self._inode, self._offset):
            return []
        entries: list[JournalEntry] = []
        if inode != self._inode or size < self._offset:
            entries = self._rest_of_rotated()
            self._inode, self._offset = inode, 0
        data = self._read(self._path, self._offset)
        end = data.rfind(b"\n") + 1
        if end == 0 and len(data) == MAX_TAIL_BYTES:
            end = len(data)  # not a line of ours, which are shorter
        self._offset += end
        return entries + list(_decode(data[:end]))

    def _rest_of_rotated(self) -> list[JournalEntry]:
        """Return what the file that was read got before it was rotated."""
        rotated = older(self._path)
        with contextlib.suppress(OSError):
            if os.stat(rotated, follow_symlinks=False).st_ino == self._inode:
                return list(_decode(self._read(rotated, self._offset)))
        return []

    def _look(self) -> tuple[int, int]:
        """Return the inode of the file that is written, and its size in bytes."""
        try:
            found = os.stat(self._path, follow_symlinks=False)
        except OSError:
            return 0, 0
        return found.st_ino, found.st_size

    def _read(self, path: Path, offset: int) -> bytes:
        try:
            if not self._job.owns(path.parent):
                return b""
            fd = open_regular(path)
            try:
                return os.pread(fd, MAX_TAIL_BYTES, offset)
            finally:
                os.close(fd)
        except OSError:
            return b""


def read_journal(job: JobDirectory, *, marks: bool = True) -> list[JournalEntry]:
    """Return the entries of all nodes, in order of time; invalid lines are skipped.

    Within a run the monotonic clock gives the time: if the wall clock was set, ``wall`` is what it
    would have been otherwise.

    Args:
        marks: read all step marks, which are most of a long journal. If false, the first and last
            of consecutive ones are read, and some more at a node's end: the account of time and
            the rate depend on no others.
    """
    entries: deque[JournalEntry] = deque(maxlen=MAX_EVENTS)
    budget = MAX_READ_BYTES
    found = islice(job.found(job.control / "journal", "*.jsonl"), _MAX_FILES)
    for path in sorted(found):
        parts: list[bytes] = []
        for number in range(KEPT_FILES + 1):  # the newest first: it matters most
            parts.insert(0, read_tail(older(path, number), budget))
            budget -= len(parts[0])
        entries.extend(_steady(_decode(*parts, marks=marks)))
    return sorted(entries, key=lambda entry: entry.wall)


def _steady(entries: Iterable[JournalEntry]) -> Iterator[JournalEntry]:
    """Yield a node's entries, with wall times that follow the monotonic clock in each run."""
    start: JournalEntry | None = None
    for entry in entries:
        is_start = isinstance(entry.event, RunStarted)
        if start is None or is_start or entry.monotonic < start.monotonic:
            start = entry
        wall = start.wall + entry.monotonic - start.monotonic
        was_set = abs(wall - entry.wall) > CLOCK_STEP_SECONDS
        yield replace(entry, wall=wall) if was_set else entry


def _lines(parts: Iterable[bytes], *, marks: bool) -> Iterator[bytes]:
    """Yield lines one at a time: a list of them takes many times the memory."""
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
