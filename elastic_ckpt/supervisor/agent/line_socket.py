"""A non-blocking socket that carries lines, and a wake-up of the thread that waits for it."""

from __future__ import annotations

import contextlib
import socket
from typing import Final

from elastic_ckpt.protocol.messages import LineReader

MAX_UNSENT: Final = 4 * 1024 * 1024
"""Bytes that may wait to be sent; a peer that has not read so many does not read at all."""


class LineSocket:
    """A connection. What the kernel does not take at once waits here.

    Attributes:
        lost: why the connection is over; empty while it works.
        unsent: what waits to be sent.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # a test's pair of sockets has no such option
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = LineReader(connection.fileno())
        self.unsent = bytearray()
        self.lost = ""

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return self._socket.fileno()

    def receive(self) -> list[bytes]:
        """Return the lines that have arrived, without their ends."""
        try:
            lines = list(self._reader.lines())
        except OSError as error:
            self.lost = self.lost or error.strerror or "the connection failed"
            return []
        if self._reader.closed:
            self.lost = self.lost or "the other end has closed the connection"
        return lines

    def send(self, data: bytes) -> None:
        """Send now what the kernel takes; the rest goes with :meth:`flush`."""
        self.unsent += data
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the kernel takes it."""
        try:
            while self.unsent:
                del self.unsent[: self._socket.send(self.unsent)]
        except BlockingIOError:
            if len(self.unsent) > MAX_UNSENT:
                self.lost = self.lost or "the other end does not read"
        except OSError as error:
            self.lost = self.lost or error.strerror or "the connection failed"

    def close(self) -> None:
        """Close it; the kernel still delivers what it has taken."""
        self._socket.close()


class Waker:
    """Wakes a thread that waits in a selector."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor that becomes readable."""
        return self._read.fileno()

    def wake(self) -> None:
        """Wake the thread; any number of calls before it looks are one."""
        with contextlib.suppress(OSError):  # it has been woken, or has closed this
            self._write.send(b"x")

    def clear(self) -> None:
        """Take note of the wake-ups so far."""
        with contextlib.suppress(OSError):
            while self._read.recv(4096):
                pass

    def close(self) -> None:
        """Close both ends."""
        self._read.close()
        self._write.close()
