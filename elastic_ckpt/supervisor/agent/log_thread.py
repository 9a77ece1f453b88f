"""Writes the ranks' logs from a thread of its own: a disk that hangs delays no worker's print."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Final

from elastic_ckpt.jobdir.worker_logs import LogWriter
from elastic_ckpt.util.units import human_bytes

MAX_WAITING_BYTES: Final = 8 * 1024 * 1024
HANGS_SECONDS: Final = 1.0
"""A slow disk slows the reading of output down; one write that takes longer than this does not."""


class LogThread:
    """A bounded queue of writes. What it has no room for while one hangs is counted and lost."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._bytes = 0
        self._began: float | None = None  # the write that is under way
        self._lost: Counter[LogWriter] = Counter()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="logs", daemon=True).start()

    def write(self, writer: LogWriter, data: bytes) -> None:
        """Have data appended; waits for room only while the disk takes what it is given."""
        with self._changed:
            while self._bytes + len(data) > MAX_WAITING_BYTES:
                if self._hangs:
                    if not self._lost[writer]:
                        self._add(0, partial(self._say_lost, writer))
                    self._lost[writer] += len(data)
                    return
                self._changed.wait(HANGS_SECONDS / 10)
            self._add(len(data), partial(writer.write, data))

    def close(self, writer: LogWriter) -> None:
        """Have a log closed after what waits for it was written."""
        with self._changed:
            self._add(0, writer.close)

    def flush(self, seconds: float) -> bool:
        """Return whether all was written within that time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._waiting and self._began is None, seconds
            )

    @property
    def _hangs(self) -> bool:
        return self._began is not None and time.monotonic() - self._began > HANGS_SECONDS

    def _add(self, size: int, act: Callable[[], None]) -> None:
        self._waiting.append((size, act))
        self._bytes += size
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                size, act = self._waiting.popleft()
                self._began = time.monotonic()
            act()
            with self._changed:
                self._began = None
                self._bytes -= size
                self._changed.notify_all()

    def _say_lost(self, writer: LogWriter) -> None:
        with self._changed:
            size = human_bytes(self._lost.pop(writer))
        line = f"\nelastic-ckpt: {size} of output are missing here: the disk did not take them\n"
        writer.write(line.encode())
