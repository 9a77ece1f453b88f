"""What silent workers do, as the kernel counts it: the difference between a wait and work."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from elastic_ckpt.policy.hang import Effort

EFFORT_SECONDS: Final = 3.0
_BUSY_SHARE: Final = 0.1  # of a core; threads that poll take less
_BYTES_PER_SECOND: Final = 64 * 1024  # heartbeats and metrics take less
_FAULTS_PER_SECOND: Final = 100
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class _Usage:
    """What a process has used so far; ``waits`` while it waits for a disk."""

    cpu_seconds: float
    faults: int
    bytes: int
    waits: bool


def measure_effort(pids: Iterable[int]) -> Effort:
    """Return what these processes and those below them do; takes ``EFFORT_SECONDS``."""
    workers = set(pids)
    before = _usages(workers)
    time.sleep(EFFORT_SECONDS)
    after = _usages(workers)
    if after.keys() - before.keys():
        return Effort.WORKING  # one was started
    spins = False
    for pid, now in after.items():
        then = before[pid]
        cpu = now.cpu_seconds - then.cpu_seconds > _BUSY_SHARE * EFFORT_SECONDS
        if (
            (cpu and pid not in workers)
            or now.bytes - then.bytes > _BYTES_PER_SECOND * EFFORT_SECONDS
            or now.faults - then.faults > _FAULTS_PER_SECOND * EFFORT_SECONDS
            or (now.waits and then.waits)
        ):
            return Effort.WORKING
        spins = spins or cpu
    return Effort.SPINNING if spins else Effort.IDLE


def _usages(workers: Iterable[int]) -> dict[int, _Usage]:
    found = {}
    for worker in workers:
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(worker).children(recursive=True)
            for pid in (worker, *(child.pid for child in below)):
                with contextlib.suppress(OSError, ValueError, IndexError):
                    found[pid] = _usage(Path(f"/proc/{pid}"))
    return found


def _usage(process: Path) -> _Usage:
    fields = (process / "stat").read_bytes().rpartition(b")")[2].split()
    count = 0
    with contextlib.suppress(OSError):
        lines = (process / "io").read_text().splitlines()
        count = sum(int(line.split()[1]) for line in lines[:2])  # rchar, wchar
    cpu = (int(fields[11]) + int(fields[12])) / _TICKS
    return _Usage(cpu, int(fields[7]) + int(fields[9]), count, fields[0] == b"D")
