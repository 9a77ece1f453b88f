"""What the workers printed: a file for each rank and incarnation, the newest few of each.

::

    .elastic-ckpt/logs/000003/00001.log    incarnation 3, rank 1
                       .../00001.log.1     what it printed before, of a long one
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastic_ckpt.core.text import printable
from elastic_ckpt.errors import DirectoryUnusable
from elastic_ckpt.store.files import create_file, open_regular, remove_tree
from elastic_ckpt.store.layout import JobDirectory

KEPT_INCARNATIONS: Final = 20
MAX_LOG_BYTES: Final = 16 * 1024 * 1024
"""Of which a rank's log has two: the one that it writes, and the one before."""

_TAIL_BYTES: Final = 16 * 1024
_TAIL_LINES: Final = 20
_TAIL_WIDTH: Final = 300

_INCARNATION = re.compile(r"[0-9]{6,18}")
_RANK = re.compile(r"([0-9]{5,18})\.log")


@dataclass(frozen=True)
class LogFile:
    """A rank's log of one incarnation."""

    incarnation: int
    rank: int
    path: Path

    def lines(self) -> Iterator[str]:
        """What it holds, safe for a terminal; nothing if it cannot be read."""
        for path in (_older(self.path), self.path):
            with contextlib.suppress(OSError), os.fdopen(open_regular(path), "rb") as file:
                for line in file:
                    yield printable(line.decode(errors="replace").rstrip("\r\n"), 4000)

    def tail(self) -> tuple[str, ...]:
        """Its last lines, each cut to a width that a record can hold."""
        try:
            with os.fdopen(open_regular(self.path), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - _TAIL_BYTES))
                text = file.read(_TAIL_BYTES).decode(errors="replace")
        except OSError:
            return ()
        lines = deque((line for line in text.splitlines() if line.strip()), maxlen=_TAIL_LINES)
        return tuple(printable(line, _TAIL_WIDTH) for line in lines)


class LogWriter:
    """Appends to a rank's log. Writing never raises: a full disk must not stop the training."""

    def __init__(self, job: JobDirectory, incarnation: int, rank: int) -> None:
        self.file = LogFile(incarnation, rank, _path(job, incarnation, rank))
        self._job = job
        self._fd = -1
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append."""
        with contextlib.suppress(OSError, DirectoryUnusable):
            if self._fd < 0 or self._size > MAX_LOG_BYTES:
                self._open()
            self._size += os.write(self._fd, data)

    def close(self) -> None:
        """Let go of the file."""
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):  # a network file system says here what it could not do
            if fd >= 0:
                os.close(fd)

    def _open(self) -> None:
        self.close()
        path = self.file.path
        for directory in (path.parent.parent, path.parent):
            self._job.require(directory)
        if self._size > MAX_LOG_BYTES:
            os.replace(path, _older(path))
        with contextlib.suppress(FileExistsError):
            os.close(create_file(path))
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK)
        self._size = os.fstat(self._fd).st_size


def log_files(job: JobDirectory) -> list[LogFile]:
    """All logs, by incarnation and rank."""
    found = []
    for directory in job.found(job.logs, "*"):
        if not _INCARNATION.fullmatch(directory.name):
            continue
        for path in job.found(directory, "*.log"):
            match = _RANK.fullmatch(path.name)
            if match:
                found.append(LogFile(int(directory.name), int(match[1]), path))
    return sorted(found, key=lambda log: (log.incarnation, log.rank))


def forget_old_logs(job: JobDirectory) -> None:
    """Remove all but those of the newest incarnations. Only the holder of the job's lock."""
    with contextlib.suppress(OSError):
        found = [path for path in job.found(job.logs, "*") if _INCARNATION.fullmatch(path.name)]
        for path in sorted(found, key=lambda path: int(path.name))[:-KEPT_INCARNATIONS]:
            remove_tree(path)


def _path(job: JobDirectory, incarnation: int, rank: int) -> Path:
    return job.logs / f"{incarnation:06d}" / f"{rank:05d}.log"


def _older(path: Path) -> Path:
    return path.with_name(path.name + ".1")
