"""What the workers printed: a file for each rank and incarnation, the newest few of each.

::

    .elastic-ckpt/logs/000003/00001.log    incarnation 3, rank 1
                       .../00001.log.1     what it printed before, of a long one

What the processes themselves have to say stands beside it: ``process_log.py``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from elastic_ckpt.errors import DirectoryUnusable
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import create_file, open_regular, read_tail, remove_tree
from elastic_ckpt.util.text import printable

KEPT_INCARNATIONS: Final = 20
MAX_LOG_BYTES: Final = 16 * 1024 * 1024
"""Of which a rank's log has two: the one that it writes, and the one before."""

_MAX_LINE_BYTES: Final = 256 * 1024
_TAIL_BYTES: Final = 16 * 1024
_TAIL_LINES: Final = 20
_TAIL_WIDTH: Final = 300

_INCARNATION = re.compile(r"[0-9]{6,18}")
_RANK = re.compile(r"[0-9]{5,18}")


@dataclass(frozen=True)
class LogFile:
    """A rank's log of one incarnation."""

    incarnation: int
    rank: int
    path: Path

    def lines(self) -> Iterator[str]:
        """What it holds, safe for a terminal; nothing if it cannot be read."""
        for path in (older(self.path), self.path):
            with contextlib.suppress(OSError), os.fdopen(open_regular(path), "rb") as file:
                # One without an end, which none of ours is, comes in pieces.
                for line in iter(partial(file.readline, _MAX_LINE_BYTES), b""):
                    yield printable(line.decode(errors="replace").rstrip("\r\n"), 4000)

    def tail(self) -> tuple[str, ...]:
        """Its last lines, each cut to a width that a record can hold."""
        text = read_tail(self.path, _TAIL_BYTES).decode(errors="replace")
        lines = deque((line for line in text.splitlines() if line.strip()), maxlen=_TAIL_LINES)
        return tuple(printable(line, _TAIL_WIDTH) for line in lines)


class GrowingFile:
    """A file of ours that is appended to; beyond its limit it becomes the older one of two.

    Nothing is written to what is no regular file, or has another name besides: somebody else put
    it there. Makes what is missing when the first byte comes.
    """

    def __init__(self, job: JobDirectory, path: Path, limit: int) -> None:
        """
        Args:
            limit: bytes; the file is a little longer when its turn is over.
        """
        self._job = job
        self._path = path
        self._limit = limit
        self._fd = -1
        self._size = 0
        self._torn = False

    def append(self, data: bytes) -> None:
        """Append.

        Raises:
            OSError: the disk says no, or took a part of it.
            DirectoryUnusable: a link, or something else, is in a directory's place.
        """
        self._make_ready()
        self._write(data)

    def append_line(self, line: bytes) -> None:
        """As :meth:`append`, but never to what is left of a line that a full disk tore."""
        self._make_ready()
        self._write(b"\n" + line if self._torn else line)

    def close(self) -> None:
        """Let go of the file; the next append opens it again."""
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):  # a network file system says here what it could not do
            if fd >= 0:
                os.close(fd)

    def _make_ready(self) -> None:
        if self._fd >= 0 and self._size <= self._limit:
            return
        self.close()
        path = self._path
        for directory in (path.parent.parent, path.parent):
            self._job.require(directory)
        if self._size > self._limit:
            os.replace(path, older(path))
            self._size = 0  # whatever fails from here on
        with contextlib.suppress(FileExistsError):
            os.close(create_file(path))
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        self._fd = os.open(path, flags)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            self.close()
            raise OSError(errno.ENXIO, "no file of ours", str(path))
        self._size = status.st_size
        self._torn = self._size > 0 and os.pread(self._fd, 1, self._size - 1) != b"\n"

    def _write(self, data: bytes) -> None:
        count = os.write(self._fd, data)
        self._size += count
        self._torn = data[count - 1 : count] != b"\n"
        if count < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))


class LogWriter:
    """Appends to a rank's log. Writing never raises: a full disk must not stop the training."""

    def __init__(self, job: JobDirectory, incarnation: int, rank: int) -> None:
        path = rank_path(job, incarnation, rank, ".log")
        self.file = LogFile(incarnation, rank, path)
        self._file = GrowingFile(job, path, MAX_LOG_BYTES)

    def write(self, data: bytes) -> None:
        """Append."""
        with contextlib.suppress(OSError, DirectoryUnusable):
            self._file.append(data)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def log_files(job: JobDirectory) -> list[LogFile]:
    """All logs, by incarnation and rank."""
    return [LogFile(*found) for found in rank_files(job, ".log")]


def forget_old_logs(job: JobDirectory) -> None:
    """Remove all but those of the newest incarnations. Only the holder of the job's lock."""
    with contextlib.suppress(OSError):
        found = [path for path in job.found(job.logs, "*") if _INCARNATION.fullmatch(path.name)]
        for path in sorted(found, key=lambda path: int(path.name))[:-KEPT_INCARNATIONS]:
            remove_tree(path)


def rank_files(job: JobDirectory, suffix: str) -> list[tuple[int, int, Path]]:
    """Incarnation, rank and path of all files of one kind, in this order; of any without one."""
    found = []
    for directory in job.found(job.logs, "*"):
        if not _INCARNATION.fullmatch(directory.name):
            continue
        for path in job.found(directory, f"*{suffix}"):
            name = path.name.removesuffix(suffix) if suffix else path.name.partition(".")[0]
            if _RANK.fullmatch(name):
                found.append((int(directory.name), int(name), path))
    return sorted(found)


def rank_path(job: JobDirectory, incarnation: int, rank: int, suffix: str) -> Path:
    """Where something of one rank in one incarnation is kept."""
    return job.logs / f"{incarnation:06d}" / f"{rank:05d}{suffix}"


def older(path: Path) -> Path:
    """Where a growing file's first half goes."""
    return path.with_name(path.name + ".1")
