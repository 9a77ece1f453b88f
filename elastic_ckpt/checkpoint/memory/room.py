"""How much memory the memory tier may take: the file system's, the host's and the cgroup's."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.disk.space import free_bytes

SPARE_SHARE: Final = 0.1
"""Share of the free memory left to training, so that a larger batch is not killed."""


def room_bytes(directory: Path, proc: Path = Path("/proc"), cgroups: Path | None = None) -> int:
    """Return the bytes that may still be used in ``directory``: the tightest limit, less a tenth.
    Pages of a tmpfs count against the cgroup of the process that touches them first."""
    limits = [free_bytes(directory)]
    if is_memory(directory, proc):
        limits += _available(proc)
        limits += _cgroup_rooms(proc, cgroups or Path("/sys/fs/cgroup"))
    return int((1.0 - SPARE_SHARE) * max(0, min(limits)))


def is_memory(directory: Path, proc: Path = Path("/proc")) -> bool:
    """Return whether a path is on a tmpfs; does not touch it."""
    best, kind = "", ""
    with contextlib.suppress(OSError, ValueError):
        for line in (proc / "self/mounts").read_text().splitlines():
            _, place, found, *_ = line.split(" ")
            inside = str(directory) == place or str(directory).startswith(place.rstrip("/") + "/")
            if inside and len(place) >= len(best):
                best, kind = place, found
    return kind in ("tmpfs", "ramfs")


def _available(proc: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (proc / "meminfo").read_text().splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        yield int(found.split()[1]) * 1024


def _cgroup_rooms(proc: Path, root: Path) -> Iterator[int]:
    """What each limit on the way up leaves, in version 2 and version 1."""
    with contextlib.suppress(OSError, ValueError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                base, names = root, ("memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            else:
                continue
            place = base / path.strip("/")
            for directory in (place, *place.parents):
                yield from _room(directory, *names)
                if directory == base:
                    break


def _room(directory: Path, limit: str, usage: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        most = (directory / limit).read_text().strip()
        if most != "max" and int(most) < sys.maxsize // 2:
            yield int(most) - int((directory / usage).read_text()) + _reclaimable(directory)


def _reclaimable(directory: Path) -> int:
    """Page cache counts as used, and makes room when it must."""
    with contextlib.suppress(OSError, ValueError):
        for line in (directory / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0
