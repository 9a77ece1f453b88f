"""Where the nodes of a job meet, and which of them leads."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from typing import Final

import msgspec

from elastic_ckpt.errors import UsageError

DEFAULT_PORT: Final = 29400
"""As torchrun's."""

LEFT_OVER_SECONDS: Final = 10.0
"""How long what a killed run left may go on to listen."""


class Rendezvous(msgspec.Struct, frozen=True):
    """The job's store, as a node sees it.

    Attributes:
        host, port: where it listens.
        listen_fd: a socket that listens there already, on the head; -1 on other nodes.
        in_use: the address is this host's, and another process listens there.
    """

    host: str
    port: int
    listen_fd: int = -1
    in_use: bool = False

    @property
    def leads(self) -> bool:
        """Whether this node is the head: it hosts the store, and says what all nodes do."""
        return self.listen_fd >= 0


def meet(endpoint: str, is_led: Callable[[], bool]) -> Rendezvous:
    """Listen at HOST[:PORT] if that is this host's and nobody does yet; who listens there leads.

    The socket is bound to that address alone, and survives the process that serves it. One that a
    killed run leaves behind for a moment is waited for.

    Args:
        is_led: whether a supervisor that is alive leads the job.

    Raises:
        UsageError: it is no endpoint, or its name is unknown.
    """
    limit = time.monotonic() + LEFT_OVER_SECONDS
    while True:
        found = _try_to_lead(endpoint)
        if found.leads or not found.in_use or is_led() or time.monotonic() > limit:
            return found
        time.sleep(0.1)


def _try_to_lead(endpoint: str) -> Rendezvous:
    host, port = parse_endpoint(endpoint)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(
            f"--rdzv-endpoint {endpoint}: {error.strerror or error}: give the name or address of "
            "a node that this one can reach"
        ) from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            # Another node's; or this host's, where somebody listens.
            return Rendezvous(host, port, in_use=error.errno == errno.EADDRINUSE)
        raise UsageError(
            f"--rdzv-endpoint {endpoint}: {error.strerror}: give another port"
        ) from None
    fd = os.dup(listener.fileno())
    listener.close()
    return Rendezvous(host, port, fd)


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of HOST, HOST:PORT or [IPV6]:PORT.

    Raises:
        UsageError: it is none of these.
    """
    host, colon, port = endpoint.rpartition(":")
    if not colon or endpoint.endswith("]"):
        host, port = endpoint, str(DEFAULT_PORT)
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--rdzv-endpoint {endpoint!r} is not HOST or HOST:PORT")
    return host, int(port)


def parse_nodes(text: str) -> tuple[int, int]:
    """MIN and MAX of ``--nnodes MIN[:MAX]``.

    Raises:
        UsageError: it is neither.
    """
    least, colon, most = text.partition(":")
    if not colon:
        most = least
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise UsageError(f"--nnodes {text!r} is neither a number from 1 nor MIN:MAX")
    return int(least), int(most)
