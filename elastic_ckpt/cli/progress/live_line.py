"""A line on a terminal that updates while a command waits: what it does, how far, the time left."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from elastic_ckpt.util.progress import QUIET_SECONDS
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import human_duration

_PERIOD_SECONDS: Final = 0.2
_CLEAR: Final = "\r\x1b[K"


class LiveLine:
    """One line on standard error, replaced each time; nothing without a terminal, nor for work of
    less than two seconds. Safe in several threads.

    Attributes:
        is_seen: whether standard error is a terminal.
    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._began = self._next = 0.0
        self.begin()
        self.is_seen = sys.stderr.isatty()
        self._is_shown = False
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Count the time from now on."""
        self._began = self._clock()
        self._next = self._began + QUIET_SECONDS

    def show(self, done: float, total: float) -> None:
        """Show how much is done, of how much; the time left follows from the pace."""
        seconds = self._clock() - self._began
        left = seconds * (total - done) / done if 0 < done < total else None
        self._show(f"{_percent(done, total)}{_left(left)}" if total else "")

    def wait(self, expected: float | None, most: float | None = None) -> None:
        """Show how long the wait has taken, of the seconds that are expected.

        Args:
            expected: None if unknown.
            most: the seconds after which the command gives up.
        """
        seconds = self._clock() - self._began
        if expected is not None and seconds < expected:
            self._show(f"{_percent(seconds, expected)}{_left(expected - seconds)}")
            return
        usual = "" if expected is None else f" (usually {human_duration(expected)})"
        limit = "" if most is None else f", up to {human_duration(most)}"
        self._show(f"{seconds:.0f} s{usual}{limit}")

    def clear(self) -> None:
        """Remove the line, so that another one can be printed."""
        with self._lock:
            if self._is_shown:
                self._is_shown = False
                self._write(_CLEAR)

    def _show(self, text: str) -> None:
        now = self._clock()
        with self._lock:
            if self.is_seen and now >= self._next:
                self._next, self._is_shown = now + _PERIOD_SECONDS, True
                line = f"{self._what}: {text}" if text else f"{self._what} ..."
                self._write(_CLEAR + printable(line)[: shutil.get_terminal_size().columns - 1])

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


@contextmanager
def live_line(what: str) -> Iterator[LiveLine]:
    """Show a line while the block works, removed at its end."""
    line = LiveLine(what)
    try:
        yield line
    finally:
        line.clear()


def _percent(done: float, total: float) -> str:
    return f"{min(99, int(100 * done / total))} %"


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f", {human_duration(max(1.0, round(seconds)))} left"
