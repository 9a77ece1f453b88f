"""Output to a descriptor that may not be read: a paused pager, Ctrl-S, a stopped ``tee``."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

MAX_WAITING_BYTES: Final = 1024 * 1024
"""Output that waits for its reader; more is dropped."""

EXIT_SECONDS: Final = 1.0
"""How long the end of a process waits at most for a terminal or pipe that is not read."""

_CHUNK: Final = 65536
_POLL_MILLISECONDS: Final = 1000


class Outlet:
    """Writes to a descriptor from a thread, through a bounded queue: :meth:`put` never waits.

    What does not fit is dropped up to the moment when all that waits was written; a line then says
    how much. The descriptor's flags stay as they are, because other processes share them.

    Args:
        report: makes that line from the number of bytes dropped; called in the thread.
    """

    def __init__(self, fd: int, report: Callable[[int], str]) -> None:
        self.fd = fd
        self._report = report
        self._changed = threading.Condition()
        self._waiting = bytearray()
        self._dropped = self._unreported = 0  # unreported: dropped when the last write failed
        self._writes_since: float | None = None  # monotonic seconds
        self._ends_line = True
        with contextlib.suppress(RuntimeError):  # the process ends, or the user has too many
            threading.Thread(target=self._run, name="outlet", daemon=True).start()

    def put(self, data: bytes) -> bool:
        """Write data soon; return False if it was dropped."""
        with self._changed:
            fits = not self._dropped and len(self._waiting) + len(data) <= MAX_WAITING_BYTES
            if fits:
                self._waiting += data
            else:
                self._dropped += len(data)
            self._changed.notify_all()
        return fits

    def flush(self, seconds: float) -> bool:
        """Wait until all is written, for up to ``seconds``; return whether it is.

        Do not wait at all for a write that has taken this long already.
        """
        limit = time.monotonic() + seconds
        with self._changed:
            while self._waiting or self._writes_since is not None:
                left = (
                    min(limit, (self._writes_since or time.monotonic()) + seconds)
                    - time.monotonic()
                )
                if left <= 0:
                    return False
                self._changed.wait(left)
            return not self._dropped

    def _run(self) -> None:
        # A terminal with "stty tostop" would stop a background process that writes to it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._dropped > self._unreported)
                data = bytes(self._waiting[:_CHUNK])
                del self._waiting[:_CHUNK]
                dropped = 0 if data else self._dropped
                self._writes_since = time.monotonic()
            if dropped:
                data = b"\n"[self._ends_line :] + self._report(dropped).encode() + b"\n"
            rest = self._write(data)
            with self._changed:
                self._writes_since = None
                if rest:
                    self._dropped += 0 if dropped else len(rest)
                else:
                    self._dropped -= dropped
                self._unreported = self._dropped if rest else 0  # try again with the next output
                self._changed.notify_all()

    def _write(self, data: bytes) -> bytes:
        """Write data, however long it takes; return what the descriptor refused."""
        try:
            while data:
                try:
                    count = os.write(self.fd, data)
                except BlockingIOError:  # another process made the descriptor non-blocking
                    poll = select.poll()
                    poll.register(self.fd, select.POLLOUT)
                    poll.poll(_POLL_MILLISECONDS)
                    continue
                self._ends_line = data[count - 1 : count] == b"\n"
                data = data[count:]
        except OSError:  # no reader is left, or the disk of a log is full
            return data
        return b""


@functools.cache
def standard_error() -> Outlet:
    """Return this process's outlet to descriptor 2, which the end of the process flushes."""

    def report(count: int) -> str:
        return f"elastic-ckpt: {count} bytes of output were not shown here, as nothing read it"

    outlet = Outlet(2, report)
    atexit.register(outlet.flush, EXIT_SECONDS)
    return outlet


def print_error(line: str, seconds: float = 0.0) -> None:
    """Print a line to ``sys.stderr``.

    Args:
        seconds: how long to wait at most for the reader, if that is descriptor 2.

    Raises:
        OSError: what stands in for standard error refused it.
    """
    if sys.stderr is sys.__stderr__:
        standard_error().put(f"{line}\n".encode(errors="backslashreplace"))
        standard_error().flush(seconds)
    else:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


class _Stream(io.RawIOBase):
    """A stream whose output goes to an outlet."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return whether the descriptor is a terminal."""
        return os.isatty(self._outlet.fd)

    def write(self, data: Any) -> int:
        """Queue data; nothing is ever refused."""
        self._outlet.put(bytes(data))
        return len(data)


@contextlib.contextmanager
def unblocked_streams(report: Callable[[int], str]) -> Iterator[None]:
    """Within the block no write to ``sys.stdout`` or ``sys.stderr`` waits; ``report`` as there."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    outlets = []
    for fd, (name, stream) in enumerate(before.items(), start=1):
        if stream is not None:
            stream.flush()
        outlets.append(Outlet(fd, report))
        raw = io.BufferedWriter(_Stream(outlets[-1]))
        encoding = getattr(stream, "encoding", None)
        setattr(sys, name, io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True))
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)
        for outlet in outlets:
            outlet.flush(EXIT_SECONDS)
