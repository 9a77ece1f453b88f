"""Copies what the workers print to the ranks' logs and to the terminal.

Through FIFOs, and in a thread of the agent: the last output of a worker that is killed or dies in
C code stays in its FIFO, and a terminal that blocks only delays workers that print.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import struct
import termios
import threading
import time
from pathlib import Path
from typing import Final

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.worker_logs import LogWriter
from elastic_ckpt.protocol.board import Board

_CHUNK: Final = 65536
_POLL_SECONDS: Final = 0.002
STREAMS: Final = ("out", "err")


class Output:
    """The output of all workers of an agent; its thread runs until the process ends."""

    def __init__(self, job: JobDirectory, board: Board, directory: Path) -> None:
        """Create the FIFOs in ``directory`` (``out-0`` is local rank 0's standard output), and
        read."""
        self._job = job
        self._board = board
        self._logs: dict[int, LogWriter] = {}  # by local rank
        self._fifos: dict[int, list[int]] = {}
        self._reading = threading.Lock()
        self._selector = selectors.DefaultSelector()
        for local_rank in range(board.slots):
            for number, stream in enumerate(STREAMS, start=1):
                path = directory / f"{stream}-{local_rank}"
                os.mkfifo(path, 0o600)
                # For writing, too, or it would seem closed whenever no worker has it open.
                fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
                self._fifos.setdefault(local_rank, []).append(fd)
                self._selector.register(fd, selectors.EVENT_READ, (local_rank, number))
        threading.Thread(target=self._run, name="output", daemon=True).start()

    def tail(self, local_rank: int, seconds: float = 1.0) -> tuple[str, ...]:
        """Return a rank's last lines; first read, for up to ``seconds``, all that it printed."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if not self._reading.acquire(timeout=_POLL_SECONDS):
                continue  # a disk that hangs may block the thread
            try:
                if not any(_unread(fd) for fd in self._fifos[local_rank]):
                    break
            finally:
                self._reading.release()
            time.sleep(_POLL_SECONDS)
        log = self._logs.get(local_rank)
        same = log is not None and log.file.incarnation == self._board.incarnation
        return log.file.tail() if log is not None and same else ()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                local_rank, number = key.data
                with self._reading:
                    data = _read(key.fd)
                    log = self._log(local_rank)
                    if log is not None:
                        log.write(data)
                with contextlib.suppress(OSError):  # the terminal is gone
                    while data:
                        data = data[os.write(number, data) :]

    def _log(self, local_rank: int) -> LogWriter | None:
        """Return the log of the running incarnation; output before a worker posted its rank is from
        the previous one."""
        incarnation, rank = self._board.incarnation, self._board.read_slot(local_rank).rank
        log = self._logs.get(local_rank)
        if rank >= 0 and (log is None or log.file.incarnation != incarnation):
            if log is not None:
                log.close()
            log = self._logs[local_rank] = LogWriter(self._job, incarnation, rank)
        return log


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, _CHUNK)
    except BlockingIOError:
        return b""


def _unread(fd: int) -> int:
    """Return the number of bytes that wait in a FIFO."""
    return int(struct.unpack("@i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0])
