"""Processes that must not outlive each other (Linux).

Two lines of defence against orphans. Supervisor and agent are subreapers: whatever loses its
parent becomes their child, and each kills what is below it when the other one dies. Beneath
that, the kernel kills forkserver and workers with their parents (PR_SET_PDEATHSIG). That signal
follows the *thread* that forked, so the agent starts the forkserver from its main thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import psutil

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36

KILL_WAIT_SECONDS: Final = 2.0


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel SIGKILL this process when the thread that forked it ends.

    Args:
        parent: the expected parent; if it is gone already, this process ends now.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def outlive_parent() -> None:
    """Take :func:`die_with_parent` back, for a process that cleans up before it ends."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def become_subreaper() -> None:
    """Adopt every orphan below this process."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants() -> list[psutil.Process]:
    """Everything below this process, adopted orphans included."""
    try:
        return psutil.Process().children(recursive=True)
    except psutil.Error:
        return []


def children_of(parent: int) -> list[psutil.Process]:
    """Those of this process's descendants whose parent has this pid; they may end meanwhile."""
    found = []
    for process in descendants():
        with contextlib.suppress(psutil.Error):
            if process.ppid() == parent:
                found.append(process)
    return found


def is_resource_tracker(process: psutil.Process) -> bool:
    """multiprocessing's cleaner of semaphores: it ends by itself when its clients are gone."""
    try:
        return any("resource_tracker" in word for word in process.cmdline())
    except psutil.Error:
        return False


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL these, resource trackers only if they stay; wait, bounded, until they are gone."""
    trackers: list[psutil.Process] = []
    victims: list[psutil.Process] = []
    for process in processes:
        (trackers if is_resource_tracker(process) else victims).append(process)
    _kill(victims)
    psutil.wait_procs(victims, timeout=KILL_WAIT_SECONDS)
    _, stuck = psutil.wait_procs(trackers, timeout=KILL_WAIT_SECONDS / 2)
    _kill(stuck)


def kill_descendants(*, spare_trackers: bool = False) -> None:
    """:func:`kill_all` on everything below this process, again until nothing new was forked.

    Args:
        spare_trackers: leave resource trackers that this process itself is a client of: they
            end, and clean up, when it does.
    """
    limit = time.monotonic() + KILL_WAIT_SECONDS
    while time.monotonic() < limit:
        found = descendants()
        if spare_trackers:
            found = [process for process in found if not is_resource_tracker(process)]
        if not found:
            return
        kill_all(found)


def reap(keep: int) -> None:
    """Collect adopted children that have ended, so that none stays a zombie.

    Args:
        keep: pid of a child that somebody else waits for.
    """
    for process in descendants():
        try:
            if process.pid == keep or process.ppid() != os.getpid():
                continue
            if process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.Error, ChildProcessError):
            continue


def reap_strangers(agent: int) -> None:
    """As PID 1, which a container's first process is: collect whom the kernel gave us and nobody
    waits for. What we started ourselves is in our session, but for the agent.

    Args:
        agent: its pid.
    """
    if os.getpid() != 1:
        return
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE or process.pid == agent:
                continue
            if os.getsid(process.pid) != os.getsid(0):
                os.waitpid(process.pid, os.WNOHANG)


def activity(workers: Iterable[int]) -> int:
    """Grows by one with each 64 KiB that these or this process write, and with each second that
    these compute: to wait for something takes less of it, and is no activity."""
    total = 0
    for pid in {os.getpid(), *workers} - {0}:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            total += process.io_counters().write_chars >> 16
            if pid != os.getpid():
                total += int(sum(process.cpu_times()[:2]))
    return total


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def count_memory_kills() -> int:
    """How often the kernel has killed something to have memory.

    In this process's control group, where there is one that counts; else on this host.
    """
    for path in (*_group_counters(), Path("/proc/vmstat")):
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = path.read_text().splitlines()
            return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return 0


def _group_counters() -> Iterator[Path]:
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if path.strip("/") and "memory" in controllers.split(","):
                yield root / "memory" / path.strip("/") / "memory.oom_control"
            elif path.strip("/") and not controllers:
                yield root / path.strip("/") / "memory.events"
