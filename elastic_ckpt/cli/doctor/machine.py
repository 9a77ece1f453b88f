"""Process limits, the temporary directory, the clock and the network."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import socket
import tempfile
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.cli.doctor.findings import Finding, ok, untried
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answer
from elastic_ckpt.util.units import human_bytes

MIN_FILES: Final = 1024
_OWN_FILES: Final = 64
_WORKER_FILES: Final = 16

_LONGEST_TMPDIR: Final = 60
"""Longest usable TMPDIR: socket paths are longer, and the kernel limits them to 107 bytes."""


def check_limits(
    workers: int,
    *,
    gpus: bool,
    core_pattern: Path = Path("/proc/sys/kernel/core_pattern"),
    fabric: Path = Path("/sys/class/infiniband"),
) -> Iterator[Finding]:
    """Check open files, core dumps, locked memory and the temporary directory.

    Args:
        workers: number of workers on this node.
        gpus: whether this node has GPUs.
        core_pattern: the kernel's setting for core dumps.
        fabric: where the kernel lists InfiniBand devices.
    """
    yield _files(workers)
    yield _cores(core_pattern)
    if gpus:
        yield _locked(fabric)
    yield _temporary()


def _files(workers: int) -> Finding:
    needed = max(MIN_FILES, _OWN_FILES + _WORKER_FILES * workers)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return ok("open files", "no limit")
    text = f"at most {limit:,}"
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
        return ok("core dumps", "piped to a program, not written to files")
    if limit != resource.RLIM_INFINITY:
        text = f"at most {human_bytes(limit)}" if limit else "not written"
        return ok("core dumps", text, limit, "bytes")
    text = "a crashing worker writes all of its memory to a file, which takes time and space"
    todo = "ulimit -c 0 before the run (systemd: LimitCORE=0)"
    return Finding("core dumps", "warning", text, todo)


def _locked(fabric: Path) -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return ok("locked memory", "no limit")
    text = f"at most {human_bytes(limit)}"
    try:
        devices = bool(os.listdir(fabric))
    except OSError:
        devices = False
    if not devices:
        return ok("locked memory", text, limit, "bytes")
    text += ", but this node has InfiniBand"
    todo = "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity), so that NCCL can use it"
    return Finding("locked memory", "warning", text, todo, limit, "bytes")


def _temporary() -> Finding:
    """Check the directory of a run's sockets and FIFOs."""
    path = "/tmp"
    with contextlib.suppress(FileNotFoundError):
        path = tempfile.gettempdir()
    if len(os.fsencode(path)) > _LONGEST_TMPDIR:
        path = "/tmp"
    try:
        with tempfile.TemporaryDirectory(prefix="elastic-ckpt-", dir=path) as directory:
            os.mkfifo(f"{directory}/fifo", 0o600)
            with socket.socket(socket.AF_UNIX) as channel:
                channel.bind(f"{directory}/socket")
    except OSError as error:
        todo = "make it writable, or set TMPDIR to a writable directory"
        return Finding(path, "problem", f"unusable: {error.strerror or error}", todo)
    return ok(path, "sockets and FIFOs work")


_UNSYNCHRONISED: Final = 0x0040
"""STA_UNSYNC of adjtimex(2)."""


class _Timex(ctypes.Structure):
    """The start of struct timex; ``modes`` of 0 only reads."""

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
    """Whether this host's clock is synchronised; None if the kernel does not report it."""
    found = _Timex()
    try:
        if ctypes.CDLL(None).adjtimex(ctypes.byref(found)) < 0:
            return None
    except (OSError, AttributeError):
        return None
    return not found.status & _UNSYNCHRONISED


def check_clock() -> Finding:
    """Check that the clock is synchronised."""
    synchronised = is_synchronised()
    if synchronised is None:
        return untried("clock", "synchronisation is not reported by the kernel")
    if synchronised:
        return ok("clock", "synchronised")
    todo = (
        "run chrony or systemd-timesyncd; otherwise ages, SLURM's time limit and deadlines that a "
        "cloud gives as a time of day may be wrong"
    )
    return Finding("clock", "warning", "not synchronised", todo)


LOOPBACK: Final = "127.0.0.1"
RESOLVE_SECONDS: Final = 10.0
_CONNECT_SECONDS: Final = 5.0
_INTERFACES: Final = "GLOO_SOCKET_IFNAME"


class _Address(msgspec.Struct, frozen=True):
    """The address of a host name, and the error on listening there; empty if it works."""

    address: str
    why: str = ""


def check_network(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Check loopback, the host's own name, and the interfaces set for gloo."""
    yield _loopback()
    yield _host()
    yield from _interfaces(environ)


def _loopback() -> Finding:
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            server.settimeout(_CONNECT_SECONDS)
            with (
                socket.create_connection(server.getsockname(), _CONNECT_SECONDS),
                server.accept()[0],
            ):
                pass
    except OSError as error:
        todo = "ip link set lo up, or check the packet filter: workers of one node connect there"
        text = f"{LOOPBACK} is unusable: {error.strerror or error}"
        return Finding("loopback", "problem", text, todo)
    return ok("loopback", "workers of this node can connect")


def _host() -> Finding:
    name = socket.gethostname()
    todo = f"add it to /etc/hosts; with several nodes gloo needs it, or {_INTERFACES}"
    try:
        found: _Address = answer(lambda: _resolve(name), _Address, RESOLVE_SECONDS)
    except (NoAnswer, WorkFailed) as error:
        return Finding("host name", "warning", f"{name} does not resolve: {error}", todo)
    if found.why:
        text = f"{name} is {found.address}, where listening fails: {found.why}"
        return Finding("host name", "warning", text, todo)
    text = f"{name} is {found.address}"
    if found.address.startswith("127.") or found.address == "::1":
        text += ", which other nodes cannot reach"
    return ok("host name", text)


def _resolve(name: str) -> Generator[_Address, None, None]:
    """Resolve and listen as the rendezvous and gloo do: on any port of the first address."""
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
        text = f"names {', '.join(missing)}, which this host lacks, so gloo would fail"
        todo = f"unset it, or set it to some of {', '.join(sorted(known))}"
        yield Finding(_INTERFACES, "problem", text, todo)
    else:
        yield ok(_INTERFACES, ", ".join(wanted))
