"""Reports to a service manager by systemd's sd_notify protocol; does nothing without one.

https://www.freedesktop.org/software/systemd/man/sd_notify.html
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Hashable, MutableMapping
from typing import Final

from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.util.text import printable

START_SECONDS: Final = 30.0
"""What a start is extended by, again and again until the workers step."""

STOP_SECONDS: Final = 15.0
"""What a stop is extended by while the save moves; so long may it stand still, too."""

_AGAIN_SECONDS: Final = 1.0
"""Between two extensions."""


class Service:
    """The service manager; times are monotonic seconds. Called from the supervisor's loop alone, so
    a ping proves that it runs."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Remove the socket's name from the environment, which workers inherit."""
        name = environ.pop("NOTIFY_SOCKET", "")
        usec = environ.pop("WATCHDOG_USEC", "")
        pid = environ.pop("WATCHDOG_PID", "")
        self._address = f"\0{name[1:]}" if name.startswith("@") else name
        watched = usec.isdecimal() and pid in ("", str(os.getpid()))
        self._ping_every = int(usec) / 4e6 if watched else 0.0
        self._next_ping = self._next_extension = 0.0
        self._is_ready = self._is_stopping = False
        self._status = ""
        self._moved_at = 0.0
        self._seen: Hashable = None

    @property
    def is_there(self) -> bool:
        """Whether there is a service manager."""
        return bool(self._address)

    def serve(self, now: float, state: RunState, status: str) -> None:
        """Tell what is new; called at each turn of the loop."""
        self.alive(now)
        if status != self._status:
            self._status = status
            self._send(f"STATUS={printable(status)}")  # one line, or it would be two fields
        if state in (RunState.RUNNING, RunState.FINISHED, RunState.PREEMPTED):
            self.ready()

    def alive(self, now: float) -> None:
        """The loop, or what it is at for so long, gets on."""
        if self._ping_every and now >= self._next_ping:
            self._next_ping = now + self._ping_every
            self._send("WATCHDOG=1")
        if not self._is_ready and not self._is_stopping:
            self._extend(now, START_SECONDS)

    def stopping(self, now: float, seen: Hashable, step_seconds: float = 0.0) -> None:
        """The run ends; it may take as long as ``seen`` changes. A step of the ranks, which takes
        ``step_seconds``, may end without a sign until then."""
        if not self._is_stopping:
            self._is_stopping = True
            self._send("STOPPING=1")
            self._next_extension = now
        if seen != self._seen:
            self._seen, self._moved_at = seen, now
        if now - self._moved_at < max(STOP_SECONDS, 2 * step_seconds):
            self._extend(now, STOP_SECONDS)

    def ready(self) -> None:
        """The workers step, or there is nothing for them to do."""
        if not self._is_ready:
            self._is_ready = True
            self._send("READY=1")

    def reloading(self) -> None:
        """The job file is read again; :meth:`reloaded` follows."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        """The job file was read."""
        if self._is_ready:
            self._send("READY=1")

    def _extend(self, now: float, seconds: float) -> None:
        if now >= self._next_extension:
            self._next_extension = now + _AGAIN_SECONDS
            self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
        ):
            channel.setblocking(False)  # a manager that does not read must not stop the loop
            channel.sendto(message.encode(errors="replace"), self._address)
