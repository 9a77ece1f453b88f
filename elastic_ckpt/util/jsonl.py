"""Files of lines that are appended to and rotated, and a thread that does it.

::

    name.jsonl      is written
    name.jsonl.1    is older; .2 is older still, up to the number of rotations
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from elastic_ckpt.util.files import allocate_ahead, create_file


def older(path: Path, number: int = 1) -> Path:
    """Return the name of a file after this number of rotations."""
    return path.with_name(f"{path.name}.{number}") if number else path


class AppendedFile:
    """A file of ours that is appended to; a long one is rotated before the next append.

    Nothing is written to what is not a regular file, or has a second name: it is not ours.

    Args:
        prepare: called before the file is opened; raises if it must not be.
        limit: bytes from which on it is rotated; None if another process does that.
        rotations: older files that are kept.
        keeps_open: no other process rotates it, so it stays open between appends.
        ahead: bytes that are allocated beyond its end, for lines that say that the disk is full.
    """

    def __init__(
        self,
        path: Path,
        prepare: Callable[[], None],
        *,
        limit: int | None,
        rotations: int,
        keeps_open: bool,
        ahead: int = 0,
    ) -> None:
        self._path = path
        self._prepare = prepare
        self._limit = limit
        self._rotations = rotations
        self._keeps_open = keeps_open
        self._ahead = ahead
        self._fd = -1
        self._size = 0
        self._inode = 0
        self._torn = False
        self._whole_until: tuple[int, int] | None = None
        """Inode and size after our last append, if it ended a line: then there is no tear."""

    def close(self) -> None:
        """Close the file; the next append opens it again."""
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):  # where a network file system reports earlier errors
            if fd >= 0:
                os.close(fd)

    def append(self, data: bytes, *, is_line: bool = False) -> None:
        """Append data; a line never to the rest of one that a full disk tore.

        Raises:
            OSError: the disk refused it, or took only a part of it.
            Exception: whatever ``prepare`` raises.
        """
        if self._fd < 0 or self._is_full:
            self.close()
            self._open()
        try:
            data = b"\n" + data if is_line and self._torn else data
            count = os.write(self._fd, data)
            self._size += count
            self._torn = data[count - 1 : count] != b"\n"
            self._whole_until = None if self._torn else (self._inode, self._size)
            if count < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        finally:
            if not self._keeps_open:
                self.close()

    @property
    def _is_full(self) -> bool:
        return self._limit is not None and self._size >= self._limit

    def _open(self) -> None:
        self._prepare()
        status = self._open_or_create()
        if self._is_full:
            self.close()
            self._rotate()
            status = self._open_or_create()
        if status.st_blocks * 512 - self._size < self._ahead // 2:
            self._allocate()
        if (status.st_ino, self._size) != self._whole_until:
            self._torn = self._size > 0 and os.pread(self._fd, 1, self._size - 1) != b"\n"

    def _open_or_create(self) -> os.stat_result:
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        try:
            self._fd = os.open(self._path, flags)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.close(create_file(self._path))
            self._fd = os.open(self._path, flags)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            self.close()
            raise OSError(errno.ENXIO, "not a regular file with one name", str(self._path))
        self._inode, self._size = status.st_ino, status.st_size
        return status

    def _allocate(self) -> None:
        try:
            allocate_ahead(self._fd, self._size, self._ahead)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self._ahead = 0  # this file system cannot

    def _rotate(self) -> None:
        for number in range(self._rotations, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(older(self._path, number - 1), older(self._path, number))


class LineWriter:
    """Writes lines from a thread. It never raises, and a disk that hangs holds no caller up.

    The queue is one without a lock that a fork, or a signal handler, could find held. A child that
    was forked gets a thread of its own.

    Args:
        name: of the thread.
        wait_seconds: how long ``put`` waits at most for a line that the caller wants on the disk; 0
            for never. Not at all while the disk is late.
        max_waiting: lines in the queue; further ones are lost.
        report: makes the line that says how many were lost, after a later one was written.
    """

    def __init__(
        self,
        name: str,
        file: AppendedFile,
        *,
        wait_seconds: float,
        max_waiting: int,
        report: Callable[[int], bytes] | None = None,
    ) -> None:
        self._name = name
        self._file = file
        self._wait_seconds = wait_seconds
        self._max_waiting = max_waiting
        self._report = report
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._waiting: queue.SimpleQueue[tuple[bytes, threading.Event | None] | None]
        self._waiting = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.RLock()
        self._is_late = False
        self._refused = self._failed = self._reported = 0

    def put(self, line: bytes, *, wait: bool = False) -> None:
        """Write a line soon; with ``wait`` before returning, if that does not take too long."""
        if self._pid != os.getpid():
            self._reset()
        if not self.start():
            if self._wait_seconds:
                self._write(line)
            else:
                self.lose()
            return
        if self._waiting.qsize() >= self._max_waiting:
            self.lose()
            return
        done = threading.Event() if wait and self._wait_seconds and not self._is_late else None
        self._waiting.put((line, done))
        if done is not None and not done.wait(self._wait_seconds):
            self._is_late = True

    def start(self) -> bool:
        """Start the thread unless it runs; whether it does, as there may be no more threads."""
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the process ends, or the user has too many
                    return False
                self._thread = thread
        return True

    def lose(self) -> None:
        """Count a line as lost."""
        self._refused += 1

    def close(self, seconds: float) -> None:
        """Write what waits, if that takes no longer than this."""
        if self._pid != os.getpid() or self._thread is None:
            return
        self._waiting.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (found := self._waiting.get()) is not None:
            line, done = found
            if self._write(line):
                self._report_lost()
            if done is not None:
                done.set()
            if self._waiting.empty():
                self._is_late = False
        self._report_lost()
        self._file.close()

    def _write(self, line: bytes) -> bool:
        try:
            self._file.append(line, is_line=True)
        except Exception:  # one line is lost, and not the thread
            self._failed += 1
            return False
        return True

    def _report_lost(self) -> None:
        lost = self._refused + self._failed
        if self._report is not None and lost > self._reported:
            with contextlib.suppress(Exception):
                self._file.append(self._report(lost - self._reported), is_line=True)
                self._reported = lost
