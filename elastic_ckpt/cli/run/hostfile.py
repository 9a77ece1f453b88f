"""``--hostfile``: the hosts of a job, the options derived from them, and which host starts them."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
from click.core import ParameterSource

from elastic_ckpt.errors import UsageError
from elastic_ckpt.protocol.rendezvous import parse_nodes
from elastic_ckpt.util.text import printable

HOSTS: Final = "elastic_ckpt.hosts"
FROM_HOSTFILE: Final = "elastic_ckpt.filled_from_hostfile"
"""Keys of click's ``meta``: the hosts, and the names of the options that the file set."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SLOTS = re.compile(r"slots=([1-9][0-9]{0,3})")


@dataclass(frozen=True)
class Hostfile:
    """The contents of a hostfile.

    Attributes:
        hosts: names or addresses, the leading host first.
        slots: workers per host; 0 if not given.
    """

    hosts: tuple[str, ...]
    slots: int


def read_hostfile(path: Path) -> Hostfile:
    """Read a hostfile, which has one host per line.

    Raises:
        UsageError: the file is unreadable, or a line is invalid; the message names it.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UsageError(f"--hostfile {path}: {error.strerror or error}") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host, *more = words
        slots = _SLOTS.fullmatch(more[0]) if len(more) == 1 else None
        if not _is_host(host) or (more and not slots):
            shown = printable(line.strip(), 80)
            problem = f"{shown!r} is neither HOST nor HOST slots=N"
        elif host.lower() in (known.lower() for known in found):
            problem = f"duplicate host {host}"
        elif found and (int(slots[1]) if slots else 0) not in found.values():
            problem = "slots=N must be the same on all lines"
        else:
            found[host] = int(slots[1]) if slots else 0
            continue
        raise UsageError(f"--hostfile {path}, line {number}: {problem}")
    if not found:
        raise UsageError(f"--hostfile {path} is empty: write one host per line")
    return Hostfile(tuple(found), next(iter(found.values())))


def apply_hostfile(context: click.Context) -> None:
    """Set the options that were not given from the hostfile, if there is one.

    Raises:
        UsageError: the file is invalid, or other hosts cannot reach its first host.
    """
    path, given = context.params.get("hostfile"), context.params
    if path is None:
        return
    file = read_hostfile(path)
    count = len(file.hosts)
    if given["nnodes"] is not None and parse_nodes(given["nnodes"])[0] > count:
        raise UsageError(
            f"--nnodes {given['nnodes']} needs more hosts than the {count} of --hostfile {path}"
        )
    found = {"nnodes": str(count)}
    if file.slots:
        found["nproc"] = str(file.slots)
    alone = len(file.hosts) == 1 and given["nnodes"] in (None, "1")
    if not alone and given["rdzv_endpoint"] is None:
        found["rdzv_endpoint"] = _endpoint(path, file.hosts[0])
    sources = {name: context.get_parameter_source(name) for name in found}
    filled = {n: v for n, v in found.items() if sources[n] is ParameterSource.DEFAULT}
    given.update(filled)
    context.meta[HOSTS], context.meta[FROM_HOSTFILE] = file.hosts, frozenset(filled)


def hosts_to_start(
    hosts: Sequence[str], node: str, environ: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """Return the hosts that this one starts: all others if it is the first and srun starts none.

    Args:
        node: this node's name; if the file contains it, no other name of this machine counts.
    """
    if environ.get("SLURM_JOB_ID") and environ.get("SLURM_STEP_NUM_NODES", "1") != "1":
        return ()
    leads = node == hosts[0] if node in hosts else is_this_machine(hosts[0])
    return tuple(hosts[1:]) if leads else ()


def is_this_machine(host: str) -> bool:
    """Whether a name or an address belongs to this machine."""
    own = {socket.gethostname().lower(), socket.getfqdn().lower(), "localhost"}
    if host.lower() in own | {name.partition(".")[0] for name in own}:
        return True
    for family, address in _addresses(host):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((address, 0))  # fails for an address of another machine
            except OSError:
                continue
            return True
    return False


def _endpoint(path: Path, host: str) -> str:
    """Return the first host as the rendezvous endpoint; the others must reach it by that name."""
    found = [ipaddress.ip_address(address.partition("%")[0]) for _, address in _addresses(host)]
    if found and all(address.is_loopback for address in found):
        raise UsageError(
            f"--hostfile {path}: {host} is {found[0]} here, which other hosts cannot reach: "
            "give a reachable address as --rdzv-endpoint"
        )
    return f"[{host}]" if ":" in host else host


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    """Resolve a name; empty if it is unknown."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError:
        return []
    return [(family, str(address[0])) for family, _, _, _, address in found]


def _is_host(text: str) -> bool:
    if _NAME.fullmatch(text):
        return True
    try:
        return bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False
