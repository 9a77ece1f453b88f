"""A file or FIFO through which another program announces that the node goes away.

Its first line is ``[DURATION] [REASON]``, with a duration like ``90``, ``90s`` or ``2m``;
``warning [REASON]`` requests only an early save, and an empty file is a notice with ``--grace``.
The duration counts from the time the file was written.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from elastic_ckpt.errors import UsageError
from elastic_ckpt.notices import SourceEvent
from elastic_ckpt.notices.polling import PollingSource
from elastic_ckpt.policy.deadline import EarlyWarning, Notice
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import parse_duration

_MAX_BYTES: Final = 4096
_MAX_SECONDS: Final = 7 * 86400.0
_YOUNG_SECONDS: Final = 10.0
"""A file written this shortly before a run started is meant for that run."""

_SETTLED_SECONDS: Final = 1.0
"""Minimum age of an empty file that counts as a notice; a younger one may still be written."""


class FileSource(PollingSource):
    """Polls four times a second; a file older than the run counts only while it is recent."""

    name = "file"
    interval_seconds = 0.25

    def __init__(self, path: Path, grace: float) -> None:
        """``grace`` is the time in seconds until the deadline if the file contains none."""
        super().__init__()
        self._path = path
        self._grace = grace
        self._began = time.time()
        self._fifo: int | None = None

    def poll(self) -> Iterator[tuple[object, SourceEvent]]:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return
        now, wall = time.monotonic(), time.time()
        if stat.S_ISFIFO(found.st_mode):
            for number, line in enumerate(self._through_fifo(found.st_ino)):
                yield (now, number), self._read(line, now)
        elif not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{self._path} is neither a file nor a FIFO")
        else:
            with open(self._path, "rb") as file:
                line = _first_line(file.read(_MAX_BYTES))
            age = max(0.0, wall - found.st_mtime)
            if not line and age < _SETTLED_SECONDS:
                return  # a program may be about to write to it
            event = self._read(line, now - age)
            young = found.st_mtime >= self._began or age < _YOUNG_SECONDS
            lasts = isinstance(event, Notice) and event.deadline > now
            if young or lasts:
                yield (found.st_mtime_ns, line), event

    def _through_fifo(self, inode: int) -> list[str]:
        if self._fifo is not None and os.fstat(self._fifo).st_ino != inode:
            os.close(self._fifo)  # another FIFO has taken its name
            self._fifo = None
        if self._fifo is None:
            self._fifo = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            data = os.read(self._fifo, _MAX_BYTES)
        except BlockingIOError:
            return []
        return data.decode(errors="replace").splitlines()

    def _read(self, line: str, since: float) -> Notice | EarlyWarning:
        first, _, rest = line.strip().partition(" ")
        if first == "warning":
            return EarlyWarning(self.name, printable(rest.strip() or str(self._path), 200))
        try:
            seconds = parse_duration(first)
            if not 0 <= seconds <= _MAX_SECONDS:
                raise ValueError(f"{first} is not a valid number of seconds")
        except (UsageError, ValueError):
            seconds, rest = self._grace, line.strip()
        return Notice(self.name, printable(rest.strip() or str(self._path), 200), since + seconds)


def _first_line(data: bytes) -> str:
    lines = data.decode(errors="replace").splitlines()
    return lines[0] if lines else ""
