"""Ports for servers of tests, of which several suites run at a time."""

from __future__ import annotations

import contextlib
import random
import socket

_RANDOM = random.SystemRandom()  # forked processes and seeded tests must not draw alike


def free_port() -> int:
    """Return a port that nobody listens on."""
    return free_ports(1)[0]


def free_ports(count: int, *, beside: int = 0) -> list[int]:
    """Return ports that nobody listens on, nor on those ``beside`` above, below the range of
    outgoing connections, so that none takes them meanwhile."""
    found: set[int] = set()
    while len(found) < count:
        port = _RANDOM.randrange(10_000, 30_000 - beside)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for one in {port, port + beside}:
                stack.enter_context(_probe()).bind(("", one))
            found.add(port)
    return list(found)


def _probe() -> socket.socket:
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return probe
