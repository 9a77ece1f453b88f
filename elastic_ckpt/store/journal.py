"""The journal: one line of JSON per event, appended with a single write.

An append of one line is atomic among the processes of one host; each node has a file of its
own because it is not between hosts. A torn last line, from a full disk or a power cut, is
skipped on reading.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec

from elastic_ckpt.store.files import create_file, open_regular
from elastic_ckpt.store.layout import JobDirectory

MAX_LINE_BYTES: Final = 64 * 1024
MAX_TAIL_BYTES: Final = 1024 * 1024
"""Read at a time by who follows a journal; the rest comes the next time."""

MAX_READ_BYTES: Final = 64 * 1024 * 1024
MAX_EVENTS: Final = 250_000
"""Of longer journals, and of those that somebody else put there, the end is read."""

_MAX_FILES: Final = 4096


class JournalEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event.

    Attributes:
        event: what happened.
        wall: seconds since the epoch, for people.
        monotonic: seconds on the host's monotonic clock, for durations.
        node: whose journal.
        data: the event's own fields.
    """

    event: str
    wall: float
    monotonic: float
    node: str
    pid: int = 0
    data: dict[str, Any] = {}


class Journal:
    """A node's journal. Writing never raises: a full disk must not stop the training."""

    def __init__(self, job: JobDirectory, node: str, *, follows: bool = False) -> None:
        """
        Args:
            follows: another node leads; what is counted is counted there.
        """
        self._job = job
        self._path = job.journal(node)
        self._node = node
        self._mark = {"follows": True} if follows else {}

    def write(self, event: str, **data: Any) -> None:
        """Append one event."""
        record = JournalEvent(
            event=event,
            wall=time.time(),
            monotonic=time.monotonic(),
            node=self._node,
            pid=os.getpid(),
            data={**data, **self._mark},
        )
        # The newline in front keeps a line that a full disk tore from taking this one with it.
        line = b"\n" + _encode(record) + b"\n"
        with contextlib.suppress(OSError):
            if self._job.owns(self._path.parent):
                self._append(line)

    def _append(self, line: bytes) -> None:
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


def _encode(record: JournalEvent) -> bytes:
    """An event as JSON; what JSON cannot hold, or is too long, is cut to its beginning."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        line = msgspec.json.encode(record)
        if len(line) <= MAX_LINE_BYTES:
            return line
    return msgspec.json.encode(
        msgspec.structs.replace(record, data={"cut": ascii(record.data)[:1000]})
    )


class JournalTail:
    """What is appended to a node's journal from now on, each event once, in order."""

    def __init__(self, job: JobDirectory, node: str) -> None:
        self._job = job
        self._path = job.journal(node)
        self._offset = self._size()

    def read(self) -> list[JournalEvent]:
        """The events since the last call; none while the disk does not answer.

        A line that is still being written comes the next time. Looking costs one system call as
        long as there is nothing new.
        """
        size = self._size()
        if size == self._offset:
            return []
        if size < self._offset:  # somebody put another file there
            self._offset = 0
        data = self._read(self._offset)
        whole = data.rfind(b"\n") + 1
        if whole == 0 and len(data) == MAX_TAIL_BYTES:
            whole = len(data)  # no line of ours is that long
        self._offset += whole
        return list(_decode(data[:whole]))

    def _size(self) -> int:
        try:
            return os.stat(self._path, follow_symlinks=False).st_size
        except OSError:
            return 0

    def _read(self, offset: int) -> bytes:
        try:
            if not self._job.owns(self._path.parent):
                return b""
            with os.fdopen(open_regular(self._path), "rb") as file:
                file.seek(offset)
                return file.read(MAX_TAIL_BYTES)
        except OSError:
            return b""


def read_journal(job: JobDirectory) -> list[JournalEvent]:
    """All nodes' events, by wall time; unreadable lines are skipped."""
    events: deque[JournalEvent] = deque(maxlen=MAX_EVENTS)
    budget = MAX_READ_BYTES
    found = islice(job.found(job.control / "journal", "*.jsonl"), _MAX_FILES)
    for path in sorted(found):
        data = _tail(path, budget)
        budget -= len(data)
        events.extend(_decode(data))
    return sorted(events, key=lambda event: event.wall)


def _tail(path: Path, limit: int) -> bytes:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - limit))
            return file.read(min(size, limit))
    except OSError:
        return b""


def _decode(data: bytes) -> Iterator[JournalEvent]:
    decoder = msgspec.json.Decoder(JournalEvent)
    for line in io.BytesIO(data):  # one at a time: a list of very many is many times the size
        if len(line) > MAX_LINE_BYTES + 1 or not line.strip():
            continue
        try:
            yield decoder.decode(line)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            continue
