"""``--hostfile``: the hosts of a job, what follows from them for ``run``, and who starts them."""

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
from elastic_ckpt.util.text import printable

HOSTS: Final = "elastic_ckpt.hosts"
FILLED: Final = "elastic_ckpt.filled_from_hostfile"
"""In click's ``meta``: the hosts, and the names of the options whose value the file gave."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SLOTS = re.compile(r"slots=([1-9][0-9]{0,3})")


@dataclass(frozen=True)
class Hostfile:
    """
    Attributes:
        hosts: names or addresses, the one that leads first.
        slots: workers on each; 0 if it does not say.
    """

    hosts: tuple[str, ...]
    slots: int


def read_hostfile(path: Path) -> Hostfile:
    """The hosts that a file names, one a line.

    Raises:
        UsageError: it cannot be read, or some line is no host; the message names it.
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
            wrong = f"{shown!r} is neither HOST nor HOST slots=N"
        elif host.lower() in (known.lower() for known in found):
            wrong = f"{host} is there twice"
        elif found and (int(slots[1]) if slots else 0) not in found.values():
            wrong = "slots=N must be the same on all lines"
        else:
            found[host] = int(slots[1]) if slots else 0
            continue
        raise UsageError(f"--hostfile {path}, line {number}: {wrong}")
    if not found:
        raise UsageError(f"--hostfile {path} names no host: give one on each line")
    return Hostfile(tuple(found), next(iter(found.values())))


def fill_in(context: click.Context) -> None:
    """Give the options that nobody gave what the hostfile says, if there is one.

    Raises:
        UsageError: it is wrong, or the first host cannot be where the others meet.
    """
    path, given = context.params.get("hostfile"), context.params
    if path is None:
        return
    file = read_hostfile(path)
    found = {"nnodes": str(len(file.hosts))}
    if file.slots:
        found["nproc"] = str(file.slots)
    alone = len(file.hosts) == 1 and given["nnodes"] in (None, "1")
    if not alone and given["rdzv_endpoint"] is None:
        found["rdzv_endpoint"] = _endpoint(path, file.hosts[0])
    sources = {name: context.get_parameter_source(name) for name in found}
    filled = {n: v for n, v in found.items() if sources[n] is ParameterSource.DEFAULT}
    given.update(filled)
    context.meta[HOSTS], context.meta[FILLED] = file.hosts, frozenset(filled)


def hosts_to_start(
    hosts: Sequence[str], node: str, environ: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """The hosts that this one starts: all others, if it is the first and srun starts none.

    Args:
        node: this node's name; where the file has it, no other name of this machine counts.
    """
    if environ.get("SLURM_JOB_ID") and environ.get("SLURM_STEP_NUM_NODES", "1") != "1":
        return ()
    leads = node == hosts[0] if node in hosts else is_this_machine(hosts[0])
    return tuple(hosts[1:]) if leads else ()


def is_this_machine(host: str) -> bool:
    """Whether a name or an address is this machine's."""
    own = {socket.gethostname().lower(), socket.getfqdn().lower(), "localhost"}
    if host.lower() in own | {name.partition(".")[0] for name in own}:
        return True
    for family, address in _addresses(host):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((address, 0))  # the kernel lets nobody have another machine's
            except OSError:
                continue
            return True
    return False


def _endpoint(path: Path, host: str) -> str:
    """Where the nodes meet: the first host, which the others must reach by that name."""
    found = [ipaddress.ip_address(address.partition("%")[0]) for _, address in _addresses(host)]
    if found and all(address.is_loopback for address in found):
        raise UsageError(
            f"--hostfile {path}: {host} is {found[0]} here, where no other host reaches it: "
            "give an address that they do as --rdzv-endpoint"
        )
    return f"[{host}]" if ":" in host else host


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    """What a name stands for; nothing if nobody knows it."""
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
