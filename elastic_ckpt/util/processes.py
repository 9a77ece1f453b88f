"""Keeps processes from outliving each other (Linux).

Two lines of defence against orphans. Supervisor and agent are subreapers: a process that loses
its parent becomes their child, and each kills everything below itself when the other one dies.
Below that, the kernel kills template and workers with their parents (PR_SET_PDEATHSIG). That
signal follows the *thread* that forked, so the agent starts the template from its main thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import psutil

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36

KILL_WAIT_SECONDS: Final = 2.0


def die_with_parent() -> None:
    """Make the kernel SIGKILL this process when the thread that forked it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def outlive_parent() -> None:
    """Undo :func:`die_with_parent`, for a process that cleans up before it ends."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def become_subreaper() -> None:
    """Make this process adopt every orphan below it."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants() -> list[psutil.Process]:
    """Return all processes below this one, including adopted orphans."""
    try:
        return psutil.Process().children(recursive=True)
    except psutil.Error:
        return []


def copies(pid: int) -> list[int]:
    """Return the running processes below this one that were forked from ``pid`` without an exec."""
    with contextlib.suppress(psutil.Error):
        words = psutil.Process(pid).cmdline()
        return [one.pid for one in descendants() if _runs(one, words)]
    return []


def _runs(process: psutil.Process, words: list[str]) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.cmdline() == words and process.status() != psutil.STATUS_ZOMBIE
    return False


def is_resource_tracker(process: psutil.Process) -> bool:
    """Whether this is multiprocessing's resource tracker, which ends after its clients."""
    try:
        return any("resource_tracker" in word for word in process.cmdline())
    except psutil.Error:
        return False


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL processes, resource trackers only if they stay; wait, bounded, for their end."""
    trackers: list[psutil.Process] = []
    victims: list[psutil.Process] = []
    for process in processes:
        (trackers if is_resource_tracker(process) else victims).append(process)
    _kill(victims)
    psutil.wait_procs(victims, timeout=KILL_WAIT_SECONDS)
    _, stuck = psutil.wait_procs(trackers, timeout=KILL_WAIT_SECONDS / 2)
    _kill(stuck)


def kill_descendants(*, spare_trackers: bool = False) -> None:
    """Kill everything below this process, again until nothing new was forked. With
    ``spare_trackers`` its resource tracker stays, which cleans up and ends after it."""
    limit = time.monotonic() + KILL_WAIT_SECONDS
    while time.monotonic() < limit:
        found = descendants()
        if spare_trackers:
            found = [process for process in found if not is_resource_tracker(process)]
        if not found:
            return
        kill_all(found)


def reap(keep: int) -> None:
    """Collect adopted children that have ended, so that none stays a zombie, except for one pid
    that other code waits for."""
    for process in descendants():
        try:
            if process.pid == keep or process.ppid() != os.getpid():
                continue
            if process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.Error, ChildProcessError):
            continue


def reap_strangers(agent: int) -> None:
    """As PID 1 of a container, collect ended orphans that were never below this process. What we
    started is in our session, except for the process ``agent``."""
    if os.getpid() != 1:
        return
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE or process.pid == agent:
                continue
            if os.getsid(process.pid) != os.getsid(0):
                os.waitpid(process.pid, os.WNOHANG)


def activity(workers: Iterable[int]) -> int:
    """Return a counter that grows by one with each 64 KiB that this process or a worker writes, and
    each CPU second of a worker: waiting costs less."""
    total = 0
    for pid in {os.getpid(), *workers} - {0}:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            total += process.io_counters().write_chars >> 16
            if pid != os.getpid():
                total += int(sum(process.cpu_times()[:2]))
    return total


def process_state(pid: int) -> str:
    """Return a process's state letter in /proc: T for a stopped one; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return ""


def signal_descendant(pid: int, number: int) -> None:
    """Send a signal to a process, if it is still one below this one: its pid may be reused."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if any(parent.pid == os.getpid() for parent in process.parents()):
            process.send_signal(number)


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
    """Return how often the kernel has killed a process for memory: in this control group if that
    has a counter, else on the host."""
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


def environment_of(python: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which ``python`` is started, as after ``activate`` of its virtual
    environment: what a script starts by name comes from there. Unchanged if it is empty."""
    found = dict(environ)
    if not python:
        return found
    programs = Path(python).parent
    found["PATH"] = ":".join(filter(None, (str(programs), environ.get("PATH"))))
    found.pop("PYTHONHOME", None)  # this interpreter's standard library
    found.pop("VIRTUAL_ENV", None)
    if (programs.parent / "pyvenv.cfg").exists():
        found["VIRTUAL_ENV"] = str(programs.parent)
    return found
