"""The journal: one line of JSON per event, appended with a single write.

An append of one line is atomic among the processes of one host; each node has a file of its
own because it is not between hosts. A torn last line, from a full disk or a power cut, is
skipped on reading.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from elastic_ckpt.store.files import create_file, open_regular
from elastic_ckpt.store.layout import JobDirectory

MAX_LINE_BYTES: Final = 64 * 1024
_MAX_READ_BYTES: Final = 256 * 1024 * 1024
"""Of a longer journal, and of one that somebody else put there, the end is read."""


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

    def __init__(self, job: JobDirectory, node: str) -> None:
        self._path = job.journal(node)
        self._node = node

    def write(self, event: str, **data: Any) -> None:
        """Append one event."""
        record = JournalEvent(
            event=event,
            wall=time.time(),
            monotonic=time.monotonic(),
            node=self._node,
            pid=os.getpid(),
            data=data,
        )
        # The newline in front keeps a line that a full disk tore from taking this one with it.
        line = b"\n" + _encode(record) + b"\n"
        try:
            fd = self._open()
            try:
                os.write(fd, line)
            finally:
                os.close(fd)
        except OSError:
            return

    def _open(self) -> int:
        with contextlib.suppress(FileExistsError):
            os.close(create_file(self._path))
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK)


def _encode(record: JournalEvent) -> bytes:
    """An event as JSON; what JSON cannot hold, or is too long, is cut to its beginning."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        line = msgspec.json.encode(record)
        if len(line) <= MAX_LINE_BYTES:
            return line
    return msgspec.json.encode(
        msgspec.structs.replace(record, data={"cut": ascii(record.data)[:1000]})
    )


def read_journal(job: JobDirectory) -> list[JournalEvent]:
    """All nodes' events, by wall time; unreadable lines are skipped."""
    events: list[JournalEvent] = []
    for path in sorted((job.control / "journal").glob("*.jsonl")):
        events.extend(_read(path))
    return sorted(events, key=lambda event: event.wall)


def _read(path: Path) -> Iterator[JournalEvent]:
    decoder = msgspec.json.Decoder(JournalEvent)
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _MAX_READ_BYTES))
            lines = file.read(_MAX_READ_BYTES).split(b"\n")
    except OSError:
        return
    for line in lines:
        if not line:
            continue
        try:
            yield decoder.decode(line)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            continue
