"""Whether the memory tier fits."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.memory.generation import GENERATIONS
from elastic_ckpt.checkpoint.memory.room import room_bytes
from elastic_ckpt.cli.doctor.directory import CheckedPath
from elastic_ckpt.cli.doctor.findings import Finding, ok
from elastic_ckpt.cli.leftovers import MEMORY, view_leftovers
from elastic_ckpt.util.units import human_bytes

_SMALL_BYTES: Final = 64 * 2**20
"""Docker's default for a container."""

_WITHOUT: Final = "without it training waits while saves go to the disk"


def check_memory(
    path: CheckedPath | None,
    *,
    shm: Path = MEMORY,
    proc: Path = Path("/proc"),
    cgroups: Path = Path("/sys/fs/cgroup"),
) -> Iterator[Finding]:
    """Check the file system of the memory tier, memory limits, and what earlier runs left.

    Args:
        path: the job directory, if known.
    """
    state = path.state_bytes if path else 0
    yield _tier(shm, state, path.held_bytes if path else 0)
    yield _limit(state, proc, cgroups)
    for left in view_leftovers(place=shm):
        yield Finding("left in memory", "warning", left.text, left.todo, left.bytes, "bytes")


def _tier(shm: Path, state: int, held: int) -> Finding:
    what = str(shm)
    try:
        found = os.statvfs(shm)
        room = room_bytes(shm) + held
    except OSError as error:
        todo = f"mount a tmpfs there, or run with --memory-dir off; {_WITHOUT}"
        return Finding(what, "warning", f"unusable: {error.strerror}", todo)
    free = found.f_bavail * found.f_frsize
    if not os.access(shm, os.W_OK | os.X_OK):
        todo = f"chmod 1777 {shm}, or run with --memory-dir off; {_WITHOUT}"
        return Finding(what, "warning", "not writable", todo)
    needed = GENERATIONS * state
    if not state and free > _SMALL_BYTES:
        text = f"{human_bytes(room)} available: checkpoints of up to half that size fit"
        return ok(what, text, room, "bytes")
    if state and needed <= room:
        text = f"{human_bytes(room)} available; two checkpoints take {human_bytes(needed)}"
        return ok(what, text, room, "bytes")
    text = f"{human_bytes(room)} available, but two checkpoints "
    text += f"take {human_bytes(needed)}" if state else "must fit"
    larger = "enlarge it (Docker: --shm-size; otherwise mount -o remount,size=)"
    todo = larger if free + held < needed or not state else "free some memory"
    return Finding(what, "warning", text, f"{todo}; {_WITHOUT}", room, "bytes")


def _limit(state: int, proc: Path, cgroups: Path) -> Finding:
    total = _total(proc)
    limit = min(_limits(proc, cgroups), default=None)
    if limit is None or (total and limit >= total):
        text = f"{human_bytes(total)}, not limited by a control group"
        return ok("memory", text, total, "bytes")
    text = f"a control group limits it to {human_bytes(limit)}, including the memory tier"
    if limit >= GENERATIONS * state:
        return ok("memory", text, limit, "bytes")
    text += f", but two checkpoints take {human_bytes(GENERATIONS * state)}"
    todo = f"raise the limit (Docker: --memory; systemd: MemoryMax=); {_WITHOUT}"
    return Finding("memory", "warning", text, todo, limit, "bytes")


def _total(proc: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    return None


def _limits(proc: Path, root: Path) -> Iterator[int]:
    """Yield the limits of all enclosing control groups, of version 2 and version 1."""
    with contextlib.suppress(OSError, ValueError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                base, name = root, "memory.max"
            elif "memory" in controllers.split(","):
                base, name = root / "memory", "memory.limit_in_bytes"
            else:
                continue
            group = base / path.strip("/")
            for directory in (group, *group.parents):
                yield from _number(directory / name)
                if directory == base:
                    break


def _number(path: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        limit = int(path.read_text())
        if limit < sys.maxsize // 2:  # version 1 writes a huge number for no limit
            yield limit
