"""Follows what workers print, as ``tail -F`` does: new incarnations and rotated files included."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Final

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.worker_logs import (
    MAX_LINE_BYTES,
    LogFile,
    log_files,
    shown_line,
    without_old_states,
)
from elastic_ckpt.util.files import open_regular
from elastic_ckpt.util.jsonl import older

FIRST_LINES: Final = 20
"""Lines of each rank that are shown of what was printed before."""

BAR_SECONDS: Final = 5.0
"""A progress bar that moves is shown this often."""

POLL_SECONDS: Final = 0.5
LOOK_SECONDS: Final = 2.0
"""How often to look for new files: on a shared file system that takes a way over the network."""

_FIRST_BYTES: Final = 64 * 1024
_CHUNK_BYTES: Final = 1024 * 1024


class FollowedLog:
    """What is appended to one rank's log."""

    def __init__(self, log: LogFile, *, from_start: bool) -> None:
        self.log = log
        self._from_start = from_start
        self._inode = self._offset = 0
        self._rest = b""
        self._shown_at = 0.0
        self._bar = ""

    def read(self) -> list[str]:
        """Return the lines completed since the last call; none if they cannot be read."""
        try:
            status = os.lstat(self.log.path)
        except OSError:
            return []
        if (status.st_ino, status.st_size) == (self._inode, self._offset):
            return []
        if not self._inode:
            return self._begin(status)
        lines = []
        if status.st_ino != self._inode:
            lines = self._read(rotated=True)
            self._inode, self._offset = status.st_ino, 0
        elif status.st_size < self._offset:
            self._offset = 0
        return lines + self._read()

    def bar(self, now: float, *, last: bool = False) -> str:
        """Return the state of a progress bar that has moved, if one is due; else empty. With
        ``last`` whatever has no end of line."""
        if not last and (b"\r" not in self._rest or now - self._shown_at < BAR_SECONDS):
            return ""
        state = shown_line(self._rest)
        if state == self._bar:
            return ""
        self._shown_at, self._bar = now, state
        return state

    def _begin(self, status: os.stat_result) -> list[str]:
        self._inode = status.st_ino
        if self._from_start:
            return self._read()
        self._offset = max(0, status.st_size - _FIRST_BYTES)
        whole = self._offset == 0
        lines = self._read()
        return list(deque(lines if whole else lines[1:], maxlen=FIRST_LINES))

    def _read(self, *, rotated: bool = False) -> list[str]:
        lines: list[str] = []
        while data := self._chunk(rotated=rotated):
            self._offset += len(data)
            *whole, self._rest = (self._rest + data).split(b"\n")
            lines += map(shown_line, whole)
            self._rest = without_old_states(self._rest)
            if len(self._rest) > MAX_LINE_BYTES:
                lines.append(shown_line(self._rest))
                self._rest = b""
            if len(data) < _CHUNK_BYTES:
                break
        return lines

    def _chunk(self, *, rotated: bool) -> bytes:
        try:
            fd = open_regular(older(self.log.path) if rotated else self.log.path)
        except OSError:
            return b""
        with os.fdopen(fd, "rb") as file:
            if os.fstat(fd).st_ino != self._inode:
                return b""  # rotated in this moment, or more than once
            file.seek(self._offset)
            return file.read(_CHUNK_BYTES)


class LogFollower:
    """Follows the newest incarnation's logs, and those of later ones."""

    def __init__(
        self,
        job: JobDirectory,
        ranks: Collection[int],
        is_over: Callable[[], bool],
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        """Follow these ranks, all if there are none, until ``is_over`` and everything is read."""
        self._job = job
        self._ranks = ranks
        self._is_over = is_over
        self._clock = clock
        self._sleep = sleep
        self._followed: dict[tuple[int, int], FollowedLog] = {}
        self._first: int | None = None
        self._looked = float("-inf")
        self._heading: FollowedLog | None = None

    def lines(self) -> Iterator[str]:
        """Yield what is printed, under a heading for each rank where it changes."""
        while True:
            over = self._is_over()  # before it is read: nothing is printed after that
            now = self._clock()
            if over or now - self._looked >= LOOK_SECONDS:
                self._looked = now
                self._look()
            for one in self._followed.values():
                lines = one.read()
                if state := one.bar(now, last=over):
                    lines.append(state)
                if lines and self._heading is not one:
                    self._heading = one
                    yield f"== incarnation {one.log.incarnation}, rank {one.log.rank}"
                yield from lines
            if over:
                return
            self._sleep(POLL_SECONDS)

    def _look(self) -> None:
        """Find new files, and forget those of incarnations before the newest."""
        found = [log for log in log_files(self._job) if not self._ranks or log.rank in self._ranks]
        newest = max((log.incarnation for log in found), default=-1)
        before, self._first = self._first, newest if self._first is None else self._first
        for log in found:
            key = (log.incarnation, log.rank)
            if log.incarnation >= self._first and key not in self._followed:
                # Of an incarnation that begins now, everything is new.
                self._followed[key] = FollowedLog(log, from_start=before is not None)
        for key in [key for key in self._followed if key[0] < newest - 1]:
            del self._followed[key]
