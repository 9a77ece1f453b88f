"""How far a long pass over bytes is: amount, rate, time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

QUIET_SECONDS: Final = 2.0
"""What takes no longer is not worth a word."""

Advance = Callable[[int], None]
"""Told of every so many bytes that were done; may raise to end the work."""

Watch = Callable[[str, int], Advance]
"""Begins to watch work: what is done, and how many bytes it is in all."""


def ignore(_: int) -> None:
    """Nobody wants to know how far it is."""


def unwatched(_what: str, _total: int) -> Advance:
    """The ``Watch`` that shows nothing."""
    return ignore


def in_lines(show: Callable[[str], None]) -> Watch:
    """The ``Watch`` that says a line every few seconds."""
    return lambda what, total: Progress(what, total, show).advance


def human_bytes(count: float | None) -> str:
    """``1.4 GB``; ``-`` where it is not known."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < (999.5 if unit == "B" else 999.95):  # what is not rounded to 1000
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Progress:
    """Says a line every two seconds, once two seconds have passed.

    Args:
        what: what is done, ``verifying epoch-0_step-120``.
        total: bytes in all.
        show: given each line.
        clock: monotonic seconds.
    """

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
        self._began = self._said = clock()
        self._done = 0

    def advance(self, count: int) -> None:
        """So many bytes more are done."""
        self._done += count
        now = self._clock()
        if now - self._said >= QUIET_SECONDS:
            self._said = now
            self._show(self.line(now))

    def line(self, now: float) -> str:
        """``verifying x: 3.2 GB of 10.0 GB, 1.1 GB/s, 6 s left``."""
        rate = self._done / max(now - self._began, 1e-9)
        left = max(0, self._total - self._done) / rate if rate else 0.0
        return (
            f"{self._what}: {human_bytes(self._done)} of {human_bytes(self._total)}, "
            f"{human_bytes(rate)}/s, {left:.0f} s left"
        )
