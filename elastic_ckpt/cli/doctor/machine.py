"""Limits of a process, and the directory for temporary files."""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import tempfile
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.cli.doctor.findings import Finding, ok
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answer
from elastic_ckpt.util.units import human_bytes

LEAST_FILES: Final = 1024
_OWN_FILES: Final = 64
_WORKER_FILES: Final = 16

_LONGEST_TMPDIR: Final = 60
"""Sockets lie further down, and the kernel takes names of 107 bytes; a longer one is not used."""


def check_limits(
    workers: int,
    *,
    gpus: bool,
    core_pattern: Path = Path("/proc/sys/kernel/core_pattern"),
    fabric: Path = Path("/sys/class/infiniband"),
) -> Iterator[Finding]:
    """Open files, core dumps, locked memory, and the directory for temporary files.

    Args:
        workers: on this node.
        gpus: whether there are any.
        core_pattern: what becomes of a core dump.
        fabric: where the kernel shows InfiniBand.
    """
    yield _files(workers)
    yield _cores(core_pattern)
    if gpus:
        yield _locked(fabric)
    yield _temporary()


def _files(workers: int) -> Finding:
    needed = max(LEAST_FILES, _OWN_FILES + _WORKER_FILES * workers)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return ok("open files", "no limit")
    text = f"{limit:,} at the most"
    if limit >= needed:
        return ok("open files", text, limit, "count")
    todo = f"ulimit -n {needed} before the run (systemd: LimitNOFILE={needed})"
    return Finding("open files", "warning", text, todo, limit, "count")


def _cores(core_pattern: Path) -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_CORE)[0]
    try:
        pattern = core_pattern.read_text(errors="replace").strip()
    except OSError:
        pattern = ""
    if pattern.startswith("|"):
        return ok("core dumps", "go to a program, not to files")
    if limit != resource.RLIM_INFINITY:
        text = f"{human_bytes(limit)} at the most" if limit else "none are written"
        return ok("core dumps", text, limit, "bytes")
    text = "a worker that crashes writes all of its memory to a file"
    todo = "ulimit -c 0 before the run (systemd: LimitCORE=0): each costs time and disk"
    return Finding("core dumps", "warning", text, todo)


def _locked(fabric: Path) -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return ok("locked memory", "no limit")
    text = f"{human_bytes(limit)} at the most"
    try:
        devices = bool(os.listdir(fabric))
    except OSError:
        devices = False
    if not devices:
        return ok("locked memory", text, limit, "bytes")
    text += ", and there is InfiniBand"
    todo = "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity), or NCCL cannot use it"
    return Finding("locked memory", "warning", text, todo, limit, "bytes")


def _temporary() -> Finding:
    """Sockets and FIFOs of a run lie there."""
    place = tempfile.gettempdir() if _has_temporary() else "/tmp"
    if len(os.fsencode(place)) > _LONGEST_TMPDIR:
        place = "/tmp"
    try:
        with tempfile.TemporaryDirectory(prefix="elastic-ckpt-", dir=place) as directory:
            os.mkfifo(f"{directory}/fifo", 0o600)
            with socket.socket(socket.AF_UNIX) as channel:
                channel.bind(f"{directory}/socket")
    except OSError as error:
        todo = "make it writable, or set TMPDIR to a directory that is; a run needs it"
        return Finding(place, "problem", f"cannot be used: {error.strerror or error}", todo)
    return ok(place, "takes sockets and FIFOs")


def _has_temporary() -> bool:
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        return False
    return True


_UNSYNCHRONISED: Final = 0x0040
"""STA_UNSYNC of adjtimex(2)."""


class _Timex(ctypes.Structure):
    """The beginning of struct timex; ``modes`` of 0 only asks."""

    _fields_ = [
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 512),
    ]


def is_synchronised() -> bool | None:
    """Whether something keeps this host's clock right; None if the kernel does not say."""
    found = _Timex()
    try:
        if ctypes.CDLL(None).adjtimex(ctypes.byref(found)) < 0:
            return None
    except (OSError, AttributeError):
        return None
    return not found.status & _UNSYNCHRONISED


def check_clock() -> Finding:
    """Synchronised, or what may be off."""
    synchronised = is_synchronised()
    if synchronised is None:
        return ok("clock", "the kernel does not say whether it is synchronised")
    if synchronised:
        return ok("clock", "is synchronised")
    todo = (
        "run chrony or systemd-timesyncd; until then ages, SLURM's time limit and deadlines that "
        "a cloud gives as a time of day may be off, and nothing else"
    )
    return Finding("clock", "warning", "nothing keeps it synchronised", todo)


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
    except (NoAnswer, WorkFailed) as error:
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
