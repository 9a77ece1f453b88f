"""Limits of a process, and the directory for temporary files."""

from __future__ import annotations

import os
import resource
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from elastic_ckpt.cli.doctor.findings import Finding, ok
from elastic_ckpt.util.progress import human_bytes

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
