"""Finds where the nodes of a job meet, and which of them leads."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from typing import Final

import msgspec

from elastic_ckpt.errors import EndpointUnknown, UsageError

DEFAULT_PORT: Final = 29400
"""Torchrun's default."""

LEFT_OVER_SECONDS: Final = 10.0
"""How long processes of a killed run may keep listening."""


class Rendezvous(msgspec.Struct, frozen=True):
    """The job's hub, as a node sees it.

    Attributes:
        host, port: where it listens.
        listen_fd: on the head a socket that already listens there; -1 on other nodes.
        in_use: the address is this host's, but another process listens there.
    """

    host: str
    port: int
    listen_fd: int = -1
    in_use: bool = False

    @property
    def leads(self) -> bool:
        """Whether this node is the head, which hosts the hub and directs all nodes."""
        return self.listen_fd >= 0


def meet(endpoint: str, is_led: Callable[[], bool]) -> Rendezvous:
    """Become the head if HOST[:PORT] is this host's and free: the node that listens there leads.

    The socket is bound to that address only, and survives the process that serves it. An address
    that a killed run still holds is retried for a moment.

    Args:
        is_led: whether a live supervisor leads the job.

    Raises:
        EndpointUnknown: its name has no address.
        UsageError: the endpoint is invalid.
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
        return _listen(host, port)
    except socket.gaierror as error:
        raise EndpointUnknown(
            f"--rdzv-endpoint {endpoint}: {error.strerror or error}: give the name or address of "
            "a node that this one can reach"
        ) from None
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            # The address is another node's, or another process listens there.
            return Rendezvous(host, port, in_use=error.errno == errno.EADDRINUSE)
        raise UsageError(
            f"--rdzv-endpoint {endpoint}: {error.strerror}: give another port"
        ) from None


def _listen(host: str, port: int) -> Rendezvous:
    """Listen on an address of this node; port 0 picks a free one. OSError as a socket raises it."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
        return Rendezvous(host, int(listener.getsockname()[1]), os.dup(listener.fileno()))


def lead_towards(endpoint: str, known: str = "") -> tuple[Rendezvous, str]:
    """Become the head on this node's own address, the one that reaches the nodes at ``endpoint``.

    Returns the rendezvous and its endpoint. The port is the same, or a free one if it is taken.

    Args:
        known: an address that ``endpoint`` had, for when its name is gone together with its host.

    Raises:
        OSError: this node has no way to that address.
    """
    host, port = parse_endpoint(endpoint)
    try:
        towards = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except socket.gaierror:
        if not known:
            raise
        towards = socket.getaddrinfo(known, port, type=socket.SOCK_DGRAM)
    family, kind, _, _, address = towards[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        own = str(probe.getsockname()[0])
    shown = f"[{own}]" if ":" in own else own
    found = _try_to_lead(f"{shown}:{port}")
    if not found.leads:
        found = _listen(own, 0)
    return found, f"{shown}:{found.port}"


def address_of(endpoint: str) -> str:
    """Return the numeric address of an endpoint's host; empty if its name has none now."""
    host, port = parse_endpoint(endpoint)
    try:
        return str(socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][4][0])
    except OSError:
        return ""


def is_same_endpoint(one: str, other: str) -> bool:
    """Return whether two endpoints are written for the same host name and port."""
    return parse_endpoint(one) == parse_endpoint(other)


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Return host and port of HOST, HOST:PORT or [IPV6]:PORT; else UsageError."""
    host, colon, port = endpoint.rpartition(":")
    if not colon or endpoint.endswith("]"):
        host, port = endpoint, str(DEFAULT_PORT)
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--rdzv-endpoint {endpoint!r} is not HOST or HOST:PORT")
    return host, int(port)


def parse_nodes(text: str) -> tuple[int, int]:
    """Return MIN and MAX of ``--nnodes MIN[:MAX]``; UsageError if it is invalid."""
    least, colon, most = text.partition(":")
    if not colon:
        most = least
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise UsageError(f"--nnodes {text!r} is neither a number from 1 nor MIN:MAX")
    return int(least), int(most)
