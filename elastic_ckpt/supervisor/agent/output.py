"""Copies what the workers print to the ranks' logs and to the terminal.

Through FIFOs, and in a thread of the agent: the last output of a worker that is killed or dies in
C code stays in its FIFO. A terminal or pipe that nothing reads delays no worker: what it does not
take is dropped there, and is still in the logs. Nor does a disk that hangs; see ``log_thread.py``.
"""

from __future__ import annotations

import fcntl
import logging
import os
import selectors
import shlex
import struct
import termios
import threading
import time
from pathlib import Path
from typing import Final

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.worker_logs import LogWriter
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.supervisor.agent.log_thread import LogThread
from elastic_ckpt.util.outlet import Outlet
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import human_bytes

log = logging.getLogger(__name__)

_CHUNK: Final = 65536
_POLL_SECONDS: Final = 0.002
STREAMS: Final = ("out", "err")

FLUSH_SECONDS: Final = 0.3
"""How long the end of an incarnation may wait for a terminal."""


class Output:
    """The output of all workers of an agent; its thread runs until the process ends."""

    def __init__(
        self, job: JobDirectory, board: Board, directory: Path, shown: tuple[int, int] = (1, 2)
    ) -> None:
        """Create the FIFOs and start to read.

        Args:
            directory: where to create the FIFOs: ``out-0`` is local rank 0's standard output.
            shown: descriptors of this process for standard output and error. They become pipes
                that this thread reads as well, so that no child inherits the originals.
        """
        self._job = job
        self._board = board
        self._outlets: list[Outlet] = []
        self._dropping = False
        self._logs: dict[int, LogWriter] = {}  # by local rank
        self._disk = LogThread()
        self._fifos: dict[int, list[int]] = {}
        self._reading = threading.Lock()
        self._selector = selectors.DefaultSelector()
        for number, fd in enumerate(shown):
            self._outlets.append(Outlet(os.dup(fd), self._report))
            self._selector.register(_replace_by_pipe(fd), selectors.EVENT_READ, (None, number))
        for local_rank in range(board.slots):
            for number, stream in enumerate(STREAMS):
                path = directory / f"{stream}-{local_rank}"
                os.mkfifo(path, 0o600)
                # For writing, too, or it would seem closed whenever no worker has it open.
                fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
                self._fifos.setdefault(local_rank, []).append(fd)
                self._selector.register(fd, selectors.EVENT_READ, (local_rank, number))
        threading.Thread(target=self._run, name="output", daemon=True).start()

    def tail(self, local_rank: int, seconds: float = 1.0) -> tuple[str, ...]:
        """Return a rank's last lines; first read, for up to ``seconds``, all that it printed."""
        self._read_all(self._fifos[local_rank], seconds)
        if not self._disk.flush(seconds):
            return ()  # to read from a disk that hangs could take forever
        kept = self._logs.get(local_rank)
        same = kept is not None and kept.file.incarnation == self._board.incarnation
        return kept.file.tail() if kept is not None and same else ()

    def flush(self, seconds: float = FLUSH_SECONDS) -> None:
        """Log and show all that the workers printed, unless that takes too long."""
        self._read_all([fd for fifos in self._fifos.values() for fd in fifos], seconds)
        self._disk.flush(seconds)
        for outlet in self._outlets:
            outlet.flush(seconds)

    def _read_all(self, fds: list[int], seconds: float) -> None:
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if not self._reading.acquire(timeout=_POLL_SECONDS):
                continue  # a slow disk may hold the thread up
            try:
                if not any(_unread(fd) for fd in fds):
                    break
            finally:
                self._reading.release()
            time.sleep(_POLL_SECONDS)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                local_rank, number = key.data
                with self._reading:
                    data = _read(key.fd)
                    kept = None if local_rank is None else self._log(local_rank)
                    if kept is not None:
                        self._disk.write(kept, data)
                self._show(number, data)

    def _show(self, number: int, data: bytes) -> None:
        taken = self._outlets[number].put(data)
        if not taken and not self._dropping:
            log.warning("standard output or error is not read: output is only logged, not shown")
        self._dropping = not taken

    def _report(self, count: int) -> str:
        size, place = human_bytes(count), shlex.quote(printable(str(self._job.root)))
        log.warning("%s of output were not shown, because nothing read it", size)
        return (
            f"elastic-ckpt: {size} of output were not shown here, because nothing read it; "
            f"the logs have it: elastic-ckpt logs {place}"
        )

    def _log(self, local_rank: int) -> LogWriter | None:
        """Return the log of the running incarnation; output before a worker posted its rank is from
        the previous one."""
        incarnation, rank = self._board.incarnation, self._board.read_slot(local_rank).rank
        kept = self._logs.get(local_rank)
        if rank >= 0 and (kept is None or kept.file.incarnation != incarnation):
            if kept is not None:
                self._disk.close(kept)
            kept = self._logs[local_rank] = LogWriter(self._job, incarnation, rank)
        return kept


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, _CHUNK)
    except BlockingIOError:
        return b""


def _replace_by_pipe(fd: int) -> int:
    """Make a descriptor the writing end of a new pipe; return the reading end."""
    reading, writing = os.pipe()
    os.dup2(writing, fd)
    os.close(writing)
    os.set_blocking(reading, False)
    return reading


def _unread(fd: int) -> int:
    """Return the number of bytes that wait in a FIFO."""
    return int(struct.unpack("@i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0])
