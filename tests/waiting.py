"""Waits for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], object], what: str = "", seconds: float = 20.0) -> None:
    """Return once the condition holds; ``what`` is said to be missing if it never does."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, what or "it did not happen in time"
        time.sleep(0.005)
