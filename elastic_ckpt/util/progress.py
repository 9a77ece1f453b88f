"""Progress of a long pass over bytes: amount, rate, time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from elastic_ckpt.util.units import human_bytes

QUIET_SECONDS: Final = 2.0
"""Shorter work reports no progress."""

Advance = Callable[[int], None]
"""Called with the number of bytes just done; may raise to stop the work."""

Watch = Callable[[str, int], Advance]
"""Called when work starts, with its description and its total bytes."""


def ignore(_: int) -> None:
    """Discard progress."""


def unwatched(_what: str, _total: int) -> Advance:
    """Start work that shows no progress: a ``Watch``."""
    return ignore


def in_lines(show: Callable[[str], None]) -> Watch:
    """Return a ``Watch`` that shows a line every two seconds."""
    return lambda what, total: Progress(what, total, show).advance


class Progress:
    """Shows a line about ``what``, of ``total`` bytes, every two seconds, the first after two. The
    clock's seconds are monotonic."""

    def __init__(
        self,
        what: str,
        total: int,
        show: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._total = total
        self._show = show
        self._clock = clock
        self._started = self._shown = clock()
        self._done = 0

    def advance(self, count: int) -> None:
        """Count these bytes, and show a line if one is due."""
        self._done += count
        now = self._clock()
        if now - self._shown >= QUIET_SECONDS:
            self._shown = now
            self._show(self.line(now))

    def line(self, now: float) -> str:
        """Return ``verifying x: 32 %, 3.2 GB of 10.0 GB, 1.1 GB/s, 6 s left``."""
        rate = self._done / max(now - self._started, 1e-9)
        left = max(0, self._total - self._done) / rate if rate else 0.0
        percent = f"{min(99, 100 * self._done // self._total)} %, " if self._total else ""
        return (
            f"{self._what}: {percent}{human_bytes(self._done)} of {human_bytes(self._total)}, "
            f"{human_bytes(rate)}/s, {left:.0f} s left"
        )
