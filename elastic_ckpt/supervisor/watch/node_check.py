"""The check of one of several nodes, before its workers count as ready: memory, GPUs, disk.

Whether the nodes reach each other is not part of it (docs/decisions.md).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.catalog import newest_of_job
from elastic_ckpt.checkpoint.memory.generation import GENERATIONS
from elastic_ckpt.checkpoint.memory.room import room_bytes
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.supervisor.settings import RunSettings
from elastic_ckpt.util.files import create_file, read_bounded
from elastic_ckpt.util.gpus import NOT_INSTALLED, Gpus, device_count, query_driver
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answers
from elastic_ckpt.util.units import human_bytes

log = logging.getLogger(__name__)

CHECK_SECONDS: Final = 10.0
"""How long the whole check may take; what has not answered by then has failed."""

AGAIN_SECONDS: Final = 60.0
"""How often a node whose check failed is checked again."""

_TRIAL_BYTES: Final = 1024 * 1024

Parts = Mapping[str, Callable[[], str]]
"""The parts of a check by name; each returns why it failed, or nothing, and may raise OSError."""


class NodeCheck:
    """Runs the check in the background; it outlives the roles of its node.

    Attributes:
        unfit: why the last one failed, which begins with the part's name; empty if it passed, None
            before the first.
    """

    def __init__(self, look: Callable[[bool], str]) -> None:
        """``look`` returns as ``unfit``, bounded; it is given whether no worker runs."""
        self.unfit: str | None = None
        self._look = look
        self._runs = False
        self._ended_at: float | None = None
        self._result: str | None = None

    def begin(self, aside: Callable[[Callable[[], None]], None], *, idle: bool) -> None:
        """Start a check unless one runs.

        Args:
            aside: runs something in a thread.
            idle: whether no worker of this node runs, or is about to.
        """
        if not self._runs:
            self._runs = True
            aside(lambda: self._work(idle))

    def _work(self, idle: bool) -> None:
        result = ""
        try:
            result = self._look(idle)
        except Exception:  # a node that cannot be checked can still be tried
            log.exception("the check of this node")
        self._result = result

    def is_due(self, now: float) -> bool:
        """Return whether to check: at first, and from time to time while it fails."""
        if self._runs or self._ended_at is None:
            return not self._runs
        return bool(self.unfit) and now - self._ended_at >= AGAIN_SECONDS

    def take(self, now: float) -> bool:
        """Return whether a check has ended since the last call; ``now`` in monotonic seconds."""
        if self._result is None:
            return False
        self.unfit, self._result = self._result, None
        self._runs, self._ended_at = False, now
        return True


class NodeLook:
    """Looks at all parts of a node. Memory that workers use says nothing about it: while they run,
    what was seen last counts."""

    def __init__(self, settings: RunSettings, memory_root: str) -> None:
        """``memory_root`` is the memory tier's; empty without one."""
        job = JobDirectory(settings.directory)
        self._memory: Parts = {
            "memory": lambda: check_memory(job, memory_root, settings.nodes[1]),
        }
        self._others: Parts = {"GPU": check_gpus, "disk": lambda: check_disk(job, settings.node)}
        self._memory_lacks = ""

    def __call__(self, idle: bool) -> str:
        """Return the first part that fails, and why; empty if all pass."""
        if not idle:
            return self._memory_lacks or failed_part(self._others)
        found = failed_part({**self._memory, **self._others})
        self._memory_lacks = found if found.partition(":")[0] in self._memory else ""
        return found


def failed_part(parts: Parts, seconds: float = CHECK_SECONDS) -> str:
    """Return the first part that fails and why; empty if all pass. In a child, as any may hang."""

    def work() -> Generator[tuple[str, str], None, None]:
        for name, look in parts.items():
            yield name, ""
            try:
                yield name, look()
            except OSError as error:
                place = f"{error.filename}: " if error.filename else ""
                yield name, f"{place}{error.strerror or error}"

    at = "start"
    try:
        with answers(work, tuple[str, str], seconds) as found:
            for at, why in found:
                if why:
                    return f"{at}: {why}"
    except (NoAnswer, WorkFailed) as error:
        return f"{at}: {error}"
    return ""


def check_memory(job: JobDirectory, root: str, nodes: int) -> str:
    """Return what the memory tier lacks for this node's share of a checkpoint, the smallest: with
    the maximum number of nodes. Nothing while the size of a checkpoint is not known."""
    newest = newest_of_job(job) if root else None
    if newest is None or newest.manifest is None:
        return ""
    place = Path(root).parent
    needed = GENERATIONS * newest.manifest.total_bytes // nodes
    room = room_bytes(place) + MemoryTier(Path(root)).held_bytes()
    if room >= needed:
        return ""
    has = human_bytes(room)
    return f"{place} has room for {has}, and this node's share needs {human_bytes(needed)}"


def check_gpus(
    count: Callable[[], int] = device_count, query: Callable[[], Gpus] = query_driver
) -> str:
    """Return which GPUs do not answer; nothing without any, or where NVML is not installed."""
    expected = count()
    if not expected or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return ""
    found = query()
    if found.why:
        return "" if found.why == NOT_INSTALLED else f"the driver does not answer: {found.why}"
    answering = len(found.devices)
    return "" if answering >= expected else f"{answering} of {expected} answer"


def check_disk(job: JobDirectory, node: str) -> str:
    """Return what is wrong with a file that is written, synced and read back; OSError likewise."""
    path, data = job.node_check(node), os.urandom(_TRIAL_BYTES)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # of a check that was killed
    fd = create_file(path)
    try:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # read it from the disk
        finally:
            os.close(fd)
        is_same = read_bounded(path, _TRIAL_BYTES) == data
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    return "" if is_same else f"{path} does not have what was written to it"
