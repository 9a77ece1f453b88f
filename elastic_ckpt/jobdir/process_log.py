"""What our own processes do: one line of JSON each time, a file for every process.

::

    .elastic-ckpt/logs/supervisor-<node>.jsonl    and .jsonl.1, what stood there before
                       agent-<node>.jsonl
                       000003/00001.jsonl         incarnation 3, rank 1

Modules log as those of any library do. What a process hands on is put into words at once and waits
in a short queue for a thread that writes it: a disk that hangs, or is full, costs lines and never
the job's time. The handler has no lock that the thread ever holds, so that Python's own clean-up of
handlers at exit waits for no disk either.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import msgspec

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.worker_logs import GrowingFile, older, rank_files, rank_path
from elastic_ckpt.util.files import read_tail
from elastic_ckpt.util.text import encodable

MAX_FILE_BYTES: Final = 4_000_000
"""Of which a process has two: the file that it writes, and the one before."""

MAX_WAITING: Final = 500
"""Lines that wait for the disk; what comes beyond is counted, and lost."""

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
"""What of ``incarnation``, ``rank`` and ``step`` is known at this moment."""


class LogLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line; what is not known, or not so, is left out.

    Attributes:
        time: RFC 3339, UTC, with milliseconds.
        monotonic: seconds on the host's monotonic clock, for durations.
        level: INFO, WARNING or ERROR.
        process: supervisor, agent or worker.
        rank: whose line it is, or whom it is about.
        step: optimizer steps that the worker had finished.
        error: the traceback of an exception; of a long one the end.
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
        process, node: what stands in each line.
        now: called for each line, in the thread that logs; what it raises is ignored.
    """

    def __init__(self, job: JobDirectory, path: Path, process: str, node: str, now: Now) -> None:
        self._file = GrowingFile(job, path, MAX_FILE_BYTES)
        self._handler = _Handler(process, node, now)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._told = 0

    @classmethod
    def of_node(cls, job: JobDirectory, process: str, node: str, now: Now) -> ProcessLog:
        """A supervisor's or an agent's."""
        return cls(job, job.logs / f"{process}-{node}{_SUFFIX}", process, node, now)

    @classmethod
    def of_worker(
        cls, job: JobDirectory, node: str, incarnation: int, rank: int, now: Now
    ) -> ProcessLog:
        """A worker's, beside what it prints."""
        path = rank_path(job, incarnation, rank, _SUFFIX)
        return cls(job, path, "worker", node, now)

    def begin(self) -> ProcessLog:
        """Take what is logged from now on. Neither this nor any logging raises, or waits."""
        logger = logging.getLogger(_LOGGER)
        logger.propagate = False  # a script's own logging is none of our business
        logger.setLevel(logging.INFO)
        logger.addHandler(self._handler)
        with contextlib.suppress(RuntimeError):  # no more threads: the queue fills up
            self._thread.start()
        return self

    def end(self, seconds: float = FLUSH_SECONDS) -> None:
        """Take no more, and write what waits, if that takes no longer."""
        logging.getLogger(_LOGGER).removeHandler(self._handler)
        self._handler.waiting.put(None)
        if self._thread.ident is not None and self._handler.is_at_home:
            self._thread.join(seconds)

    def _write(self) -> None:
        lost = 0
        while (line := self._handler.waiting.get()) is not None:
            try:
                self._file.append_line(line)
            except Exception:  # whatever it is, training goes on
                lost += 1
                continue
            with contextlib.suppress(Exception):
                self._tell_lost(lost + self._handler.lost)
        with contextlib.suppress(Exception):
            self._tell_lost(lost + self._handler.lost)
        self._file.close()

    def _tell_lost(self, lost: int) -> None:
        """Say once more lines are lost than was said before."""
        if lost > self._told:
            message = f"{lost - self._told} lines could not be written"
            self._file.append_line(self._handler.line(message, "WARNING"))
            self._told = lost


class _Handler(logging.Handler):
    """Puts records into words and into the queue; a child that was forked has no log.

    Attributes:
        waiting: for the disk; None is the end.
        lost: records that found no place in it.
    """

    def __init__(self, process: str, node: str, now: Now) -> None:
        super().__init__()
        # In C, with no lock that a fork could leave held; nor is one of a signal handler's to fear.
        self.waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.lost = 0
        self._process = process
        self._node = encodable(node)
        self._now = now
        self._pid = os.getpid()

    @property
    def is_at_home(self) -> bool:
        """Whether this is the process that the log is of."""
        return os.getpid() == self._pid

    def emit(self, record: logging.LogRecord) -> None:
        """As logging does; never raises."""
        try:
            if not self.is_at_home:
                return
            if self.waiting.qsize() >= MAX_WAITING:
                self.lost += 1
                return
            self.waiting.put(self._encode(record))
        except Exception:  # a message that cannot be put into words, say
            self.lost += 1

    def line(self, message: str, level: str, created: float | None = None, **more: Any) -> bytes:
        """One line as it stands in the file."""
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
        if not known.get("incarnation"):  # nothing was launched yet
            known.pop("incarnation", None)
        if record.exc_info and record.exc_info[1] is not None:
            text = logging.Formatter().formatException(record.exc_info)
            known["error"] = encodable(text[-_MAX_ERROR:])
        return self.line(record.getMessage(), record.levelname, record.created, **known)


def read_process_logs(job: JobDirectory) -> list[LogLine]:
    """What all processes of the job logged, by time; of very long logs the newest.

    What cannot be read, and lines that are none of ours, are skipped.
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
