"""How much of its time a copy in the background leaves to training: pure."""

from __future__ import annotations

from typing import Final

SLOWED: Final = 0.95
"""Training at less than this share of its pace without a copy is slowed."""

MAX_EASE: Final = 8.0
"""Pauses are at most so many times as long as the work between them: a copy makes progress."""

DROP_MARGIN: Final = 1.25
"""A copy is dropped for a newer one if that fits into the time left even at this many times its
expected duration."""

_WINDOW_SECONDS: Final = 2.0
_WINDOW_STEPS: Final = 5


def drops_for_newer(rate: float, newer_bytes: float, left: float) -> bool:
    """Return whether to drop a copy that is under way for the newer checkpoint.

    A copy that is not finished is worth nothing: near a deadline the older one comes first.

    Args:
        rate: bytes per second of this copy; 0 if it has only begun.
        left: seconds until the deadline; infinite without one.
    """
    return rate <= 0 or DROP_MARGIN * newer_bytes / rate <= left


class Pace:
    """Compares the pace of training beside a copy with that without one."""

    def __init__(self) -> None:
        self._alone = 0.0  # steps per second
        self._since: tuple[float, int, bool] | None = None
        self.is_slowed = False

    def feed(self, now: float, finished: int, *, copying: bool) -> None:
        """Take in how many steps are finished at monotonic ``now``."""
        since = self._since
        if since is None or since[2] is not copying or finished < since[1]:
            self._since = (now, finished, copying)
            self.is_slowed = False
            return
        seconds, steps = now - since[0], finished - since[1]
        if seconds < _WINDOW_SECONDS or (steps < _WINDOW_STEPS and seconds < 60.0):
            return
        pace = steps / seconds
        if not copying:
            self._alone = pace
        self.is_slowed = copying and pace < SLOWED * self._alone
        self._since = (now, finished, copying)


class Throttle:
    """Says how long a copy should pause.

    Args:
        rate: bytes per second at most; 0 for no limit.
    """

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._last = now
        self._due = now
        self._ease = 0.0

    def pause(self, count: int, now: float, *, slowed: bool) -> float:
        """Return the seconds to wait after so many bytes, at monotonic ``now``."""
        worked, self._last = max(0.0, now - self._last), now
        if slowed:
            self._ease = min(MAX_EASE, max(0.5, 2 * self._ease))
        else:
            self._ease = self._ease / 2 if self._ease > 0.25 else 0.0
        if self._rate:
            self._due = max(self._due, now - 1.0) + count / self._rate
        seconds = max(self._ease * worked, self._due - now if self._rate else 0.0, 0.0)
        self._last += seconds
        return seconds
