"""Can workers meet: on this host, and by its name."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Iterator, Mapping
from typing import Final

import msgspec

from elastic_ckpt.util.bounded import Refused, Silent, answer
from elastic_ckpt.cli.doctor.findings import Finding, ok

LOOPBACK: Final = "127.0.0.1"
_NAME_SECONDS: Final = 10.0
_MEET_SECONDS: Final = 5.0
_INTERFACES: Final = "GLOO_SOCKET_IFNAME"


class _Address(msgspec.Struct, frozen=True):
    """What a name stands for.

    Attributes:
        why: no port of it can be had here; empty if one can.
    """

    address: str
    why: str = ""


def check_network(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Loopback, the host's own name, and the interfaces that gloo is told to use."""
    yield _loopback()
    yield _host()
    yield from _interfaces(environ)


def _loopback() -> Finding:
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            server.settimeout(_MEET_SECONDS)
            with (
                socket.create_connection(server.getsockname(), _MEET_SECONDS),
                server.accept()[0],
            ):
                pass
    except OSError as error:
        todo = "ip link set lo up, or see what filters it: workers of one node meet there"
        text = f"{LOOPBACK} cannot be used: {error.strerror or error}"
        return Finding("loopback", "problem", text, todo)
    return ok("loopback", "workers of this node can meet")


def _host() -> Finding:
    name = socket.gethostname()
    todo = (
        "put it into /etc/hosts; one node does without, on several ones gloo needs it, or "
        f"{_INTERFACES}"
    )
    try:
        found: _Address = answer(lambda: _resolve(name), _Address, _NAME_SECONDS)
    except (Silent, Refused) as error:
        return Finding("host name", "warning", f"{name} does not resolve: {error}", todo)
    if found.why:
        text = f"{name} is {found.address}, where no port can be had: {found.why}"
        return Finding("host name", "warning", text, todo)
    text = f"{name} is {found.address}"
    if found.address.startswith("127.") or found.address == "::1":
        text += ": other nodes need an address that they reach"
    return ok("host name", text)


def _resolve(name: str) -> Generator[_Address, None, None]:
    """As the rendezvous and gloo do: the first address of the name, and any port there."""
    family, kind, protocol, _, address = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as server:
        try:
            server.bind(address)
            server.listen(1)
        except OSError as error:
            yield _Address(str(address[0]), error.strerror or str(error))
        else:
            yield _Address(str(address[0]))


def _interfaces(environ: Mapping[str, str]) -> Iterator[Finding]:
    wanted = [name.strip() for name in environ.get(_INTERFACES, "").split(",") if name.strip()]
    if not wanted:
        return
    known = {name for _, name in socket.if_nameindex()}
    missing = [name for name in wanted if name not in known]
    if missing:
        text = f"names {', '.join(missing)}, which this host lacks"
        todo = f"set it to some of {', '.join(sorted(known))}, or to nothing: gloo would fail"
        yield Finding(_INTERFACES, "problem", text, todo)
    else:
        yield ok(_INTERFACES, ", ".join(wanted))
