"""Lets a Prometheus see how a job has ended: otherwise its last look shows a job that trains."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Final

LONGEST_SECONDS: Final = 60.0
"""How long the end of a finished job is delayed at most."""

_MARGIN: Final = 0.5  # of the time between two looks
_SHORTEST_MARGIN_SECONDS: Final = 3.0  # a busy machine looks late
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class LastLook:
    """Knows when a Prometheus has looked, and waits for its next look."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._before = self._newest = 0.0  # monotonic seconds of the last two looks; 0 for none
        self._ends = False

    def looked(self) -> None:
        """Note a look of a Prometheus, or of what looks like one."""
        with self._changed:
            self._before, self._newest = self._newest, time.monotonic()
            self._changed.notify_all()

    def wait(self, longest: float = LONGEST_SECONDS) -> bool:
        """Wait for the next look until it is late by half of the time between two, or by 3 s.

        Does not wait if none is due any more; a signal ends it. Return whether one came.
        """
        with self._changed:
            newest = self._newest
            every = newest - self._before
            if not self._before or every > longest:
                return False
            late = max(every * _MARGIN, _SHORTEST_MARGIN_SECONDS)
            until = min(newest + every + late, time.monotonic() + longest)
            while self._newest == newest and not self._ends:
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 0.1))  # a signal's handler runs in between
            return self._newest != newest

    @contextlib.contextmanager
    def ended_by_signals(self) -> Iterator[None]:
        """Within the block a signal that would end the process ends the wait."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            signal.signal(number, self._end)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, *_: object) -> None:
        self._ends = True
