"""What the workers printed: a file for each rank and incarnation, the newest few of each.

::

    .elastic-ckpt/logs/000003/00001.log    incarnation 3, rank 1
                       .../00001.log.1     what it printed earlier, once the file is long

The logs of our own processes are in ``process_log.py``.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from elastic_ckpt.errors import DirectoryUnusable
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import open_regular, read_tail, remove_tree
from elastic_ckpt.util.jsonl import AppendedFile, older
from elastic_ckpt.util.text import folded, printable

KEPT_INCARNATIONS: Final = 20
MAX_LOG_BYTES: Final = 16 * 1024 * 1024
"""Of each of a rank's two files: the one that is written, and the older one."""

MAX_LINE_BYTES: Final = 256 * 1024
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
        """Yield its lines, safe for a terminal, with progress bars folded; none if it cannot be
        read."""
        for path in (older(self.path), self.path):
            with contextlib.suppress(OSError), os.fdopen(open_regular(path), "rb") as file:
                rest = b""
                for piece in iter(partial(file.readline, MAX_LINE_BYTES), b""):
                    rest = without_old_states(rest + piece)
                    if rest.endswith(b"\n") or b"\r" not in rest:  # a line that is too long
                        yield shown_line(rest)
                        rest = b""
                if rest:
                    yield shown_line(rest)

    def tail(self) -> tuple[str, ...]:
        """Return its last lines, each cut to a width that a record can hold."""
        text = read_tail(self.path, _TAIL_BYTES).decode(errors="replace")
        lines = deque(filter(str.strip, map(folded, text.split("\n"))), maxlen=_TAIL_LINES)
        return tuple(printable(line, _TAIL_WIDTH) for line in lines)


def without_old_states(line: bytes) -> bytes:
    """Return a line, or its beginning, without the states of a progress bar that are overwritten:
    one bar may print for days."""
    return b"\r".join(line.rsplit(b"\r", 2)[-2:])


def shown_line(line: bytes) -> str:
    """Return a line of a log, safe for a terminal."""
    return printable(folded(line.decode(errors="replace")), 4000)


class LogWriter:
    """Appends to a rank's log. Writing never raises: a full disk must not stop the training."""

    def __init__(self, job: JobDirectory, incarnation: int, rank: int) -> None:
        path = rank_path(job, incarnation, rank, ".log")
        self.file = LogFile(incarnation, rank, path)
        self._file = growing_file(job, path, MAX_LOG_BYTES)

    def write(self, data: bytes) -> None:
        """Append what the rank printed."""
        with contextlib.suppress(OSError, DirectoryUnusable):
            self._file.append(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def log_files(job: JobDirectory) -> list[LogFile]:
    """Return all logs, by incarnation and rank."""
    return [LogFile(*found) for found in rank_files(job, ".log")]


def forget_old_logs(job: JobDirectory) -> None:
    """Remove the logs of old incarnations. Only the holder of the job's lock may call it."""
    with contextlib.suppress(OSError):
        found = [path for path in job.found(job.logs, "*") if _INCARNATION.fullmatch(path.name)]
        for path in sorted(found, key=lambda path: int(path.name))[:-KEPT_INCARNATIONS]:
            remove_tree(path)


def rank_files(job: JobDirectory, suffix: str) -> list[tuple[int, int, Path]]:
    """Return incarnation, rank and path of all files with a suffix, sorted; "" is any suffix."""
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
    """Return the path of one rank's file of an incarnation."""
    return job.logs / f"{incarnation:06d}" / f"{rank:05d}{suffix}"


def growing_file(job: JobDirectory, path: Path, limit: int) -> AppendedFile:
    """Return a file below the logs, whose directories are made when the first byte comes."""

    def prepare() -> None:
        for directory in (path.parent.parent, path.parent):
            job.require(directory)

    return AppendedFile(path, prepare, limit=limit, rotations=1, keeps_open=True)
