"""The logs of our own processes: a file for each process, a line of JSON for each record.

::

    .elastic-ckpt/logs/supervisor-<node>.jsonl    and .jsonl.1, which is older
                       agent-<node>.jsonl
                       000003/00001.jsonl         incarnation 3, rank 1

Modules log as those of any library do. Each record is encoded at once and waits in a short queue
for a thread that writes it: a disk that hangs or is full costs lines and never the job's time. The
thread never holds the handler's lock, so Python's clean-up at exit does not wait for the disk.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import msgspec

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.worker_logs import growing_file, rank_files, rank_path
from elastic_ckpt.util.files import read_tail
from elastic_ckpt.util.jsonl import AppendedFile, LineWriter, older
from elastic_ckpt.util.text import encodable

MAX_FILE_BYTES: Final = 4_000_000
"""Of each of a process's two files: the one that is written, and the older one."""

MAX_WAITING: Final = 500
"""Lines that wait for the disk; further ones are counted and lost."""

FLUSH_SECONDS: Final = 0.5
"""How long the end of a process may wait for its last lines."""

MAX_READ_BYTES: Final = 32 * 1024 * 1024
MAX_LINE_BYTES: Final = 128 * 1024

_MAX_MESSAGE: Final = 4000
_MAX_ERROR: Final = 12_000
_LOGGER: Final = "elastic_ckpt"
_SUFFIX: Final = ".jsonl"
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z")

Now = Callable[[], Mapping[str, int]]
"""Returns those of ``incarnation``, ``rank`` and ``step`` that are known."""


class LogLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line; fields without a value are left out.

    Attributes:
        time: RFC 3339, UTC, with milliseconds.
        monotonic: seconds on the host's monotonic clock, for durations.
        level: INFO, WARNING or ERROR.
        process: supervisor, agent or worker.
        rank: the worker that wrote the line, or that it is about.
        step: optimizer steps that the worker had finished.
        error: the traceback of an exception, or its end if it is long.
    """

    time: str
    monotonic: float
    level: str
    process: str
    node: str
    pid: int
    incarnation: int | None = None
    rank: int | None = None
    step: int | None = None
    message: str
    error: str = ""


class ProcessLog:
    """This process's log, from :meth:`begin` to :meth:`end`.

    Args:
        process, node: stand in each line.
        now: called for each line, in the thread that logs; its exceptions are ignored.
    """

    def __init__(self, job: JobDirectory, path: Path, process: str, node: str, now: Now) -> None:
        file = growing_file(job, path, MAX_FILE_BYTES)
        self._handler = _Handler(file, process, node, now)

    @classmethod
    def of_node(cls, job: JobDirectory, process: str, node: str, now: Now) -> ProcessLog:
        """Return a supervisor's or an agent's log."""
        return cls(job, job.logs / f"{process}-{node}{_SUFFIX}", process, node, now)

    @classmethod
    def of_worker(
        cls, job: JobDirectory, node: str, incarnation: int, rank: int, now: Now
    ) -> ProcessLog:
        """Return a worker's log, next to what it prints."""
        path = rank_path(job, incarnation, rank, _SUFFIX)
        return cls(job, path, "worker", node, now)

    def begin(self) -> ProcessLog:
        """Write what is logged from now on. Neither this nor any logging raises, or waits."""
        logger = logging.getLogger(_LOGGER)
        logger.propagate = False  # the script configures its own logging
        logger.setLevel(logging.INFO)
        logger.addHandler(self._handler)
        self._handler.writer.start()
        return self

    def end(self, seconds: float = FLUSH_SECONDS) -> None:
        """Stop logging, and write what waits if that takes no longer than this."""
        logging.getLogger(_LOGGER).removeHandler(self._handler)
        self._handler.writer.close(seconds)


class _Handler(logging.Handler):
    """Encodes records for the writer; a child that was forked has no log."""

    def __init__(self, file: AppendedFile, process: str, node: str, now: Now) -> None:
        super().__init__()
        self.writer = LineWriter(
            "log", file, wait_seconds=0, max_waiting=MAX_WAITING, report=self._report
        )
        self._process = process
        self._node = encodable(node)
        self._now = now
        self._pid = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record; never raises."""
        if os.getpid() != self._pid:
            return
        try:
            line = self._encode(record)
        except Exception:  # its message cannot be formatted, say
            self.writer.lose()
        else:
            self.writer.put(line)

    def _report(self, lost: int) -> bytes:
        return self.line(f"{lost} lines could not be written", "WARNING")

    def line(self, message: str, level: str, created: float | None = None, **more: Any) -> bytes:
        """Return a line of the file."""
        now = datetime.fromtimestamp(time.time() if created is None else created, timezone.utc)
        line = LogLine(
            time=f"{now:%Y-%m-%dT%H:%M:%S}.{now.microsecond // 1000:03d}Z",
            monotonic=round(time.monotonic(), 6),
            level=level,
            process=self._process,
            node=self._node,
            pid=self._pid,
            message=encodable(message[:_MAX_MESSAGE]),
            **more,
        )
        return msgspec.json.encode(line) + b"\n"

    def _encode(self, record: logging.LogRecord) -> bytes:
        known: dict[str, Any] = {}
        with contextlib.suppress(Exception):
            known.update(self._now())
        known |= {name: vars(record)[name] for name in ("rank", "step") if name in vars(record)}
        if not known.get("incarnation"):  # before the first launch
            known.pop("incarnation", None)
        if record.exc_info and record.exc_info[1] is not None:
            text = logging.Formatter().formatException(record.exc_info)
            known["error"] = encodable(text[-_MAX_ERROR:])
        return self.line(record.getMessage(), record.levelname, record.created, **known)


def read_process_logs(job: JobDirectory) -> list[LogLine]:
    """Return what all processes of the job logged, by time; of very long logs the newest lines.

    Unreadable files and invalid lines are skipped.
    """
    workers = [path for _, _, path in reversed(rank_files(job, _SUFFIX))]
    lines: list[LogLine] = []
    budget = MAX_READ_BYTES
    newest = [*sorted(job.found(job.logs, f"*{_SUFFIX}"), reverse=True), *workers]
    for path in (*newest, *map(older, newest)):
        data = read_tail(path, min(budget, MAX_FILE_BYTES + MAX_LINE_BYTES))
        budget -= len(data)
        lines.extend(_decode(data))
    return sorted(lines, key=lambda line: (line.time, line.monotonic))


def _decode(data: bytes) -> Iterator[LogLine]:
    decoder = msgspec.json.Decoder(LogLine)
    for text in io.BytesIO(data):
        if len(text) > MAX_LINE_BYTES or not text.strip():
            continue
        with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError):
            line = decoder.decode(text)
            if _TIME.fullmatch(line.time):
                yield line
