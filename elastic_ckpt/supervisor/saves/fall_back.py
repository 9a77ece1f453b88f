"""A fall-back to an older checkpoint, which another thread carries out."""

from __future__ import annotations

import threading


class FallBack:
    """One fall-back, which is cancelled or acts, but not both.

    Attributes:
        line: what was done; None until it is over.
    """

    def __init__(self) -> None:
        self.line: str | None = None
        self._decided = threading.Lock()

    def may_act(self) -> bool:
        """Return whether to act now: once, and not after :meth:`cancel`."""
        return self._decided.acquire(blocking=False)

    def cancel(self) -> bool:
        """Return whether it will not act any more."""
        return self._decided.acquire(blocking=False)
