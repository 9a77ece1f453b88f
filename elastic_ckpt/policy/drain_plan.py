"""What of the memory tier still has to reach the disk, and when it is tried."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

RETRY_SECONDS: Final = 30.0
"""Time before a failed drain is retried, unless it is hurried."""


class DrainPlan:
    """Remembers of each attempt in memory what became of it. Times are monotonic seconds.

    Nothing is repeated without a change: what has been drained is not drained again, even if the
    tier cannot note it because its memory is full.
    """

    def __init__(self) -> None:
        self._drained: set[str] = set()
        self._retry_at: dict[str, float] = {}

    def is_pending(self, attempt: str) -> bool:
        """Return whether this run has not brought it to the disk yet."""
        return attempt not in self._drained

    def is_due(self, attempt: str, now: float) -> bool:
        """Return whether to drain it now: it was not tried, or failed long enough ago."""
        return self.is_pending(attempt) and self._retry_at.get(attempt, 0.0) <= now

    def has_retry(self, now: float) -> bool:
        """Return whether the time has come to retry one that failed."""
        return any(at <= now for at in self._retry_at.values())

    def has_failed(self, attempt: str) -> bool:
        """Return whether its last drain failed."""
        return attempt in self._retry_at

    def begin(self, attempt: str) -> None:
        """Note that its drain begins."""
        self._retry_at.pop(attempt, None)

    def done(self, attempt: str, present: Collection[str]) -> None:
        """Note that it is on the disk; of those that are no longer ``present``, forget it."""
        self._drained = (self._drained & set(present)) | {attempt}

    def failed(self, attempt: str, now: float, *, again: bool = False) -> None:
        """Note that it did not get there; ``again`` retries it at once."""
        self._retry_at[attempt] = 0.0 if again else now + RETRY_SECONDS

    def retry_all(self) -> None:
        """Retry everything that failed."""
        self._retry_at.clear()
