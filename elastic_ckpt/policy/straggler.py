"""Which ranks are slower than the others in their own work.

In synchronous training every rank takes equally long for a step, because the fast ones wait for
the slow one. So the time compared is what each rank spends on its own batch, without waiting.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Final

SLOW_FACTOR: Final = 1.3
"""A rank is slow from this multiple of the others' median on."""

MIN_SHARE: Final = 0.1
"""Share of a step that a slow rank must cost to be reported."""


def stragglers(busy: Mapping[int, float], step_seconds: float) -> dict[int, float]:
    """Return the slow ranks, each with its busy time as a multiple of the others' median.

    Args:
        busy: seconds of a step that each rank spends on its own work; 0 if unknown.
        step_seconds: duration of a whole step.
    """
    known = {rank: seconds for rank, seconds in busy.items() if seconds > 0}
    found: dict[int, float] = {}
    for rank, seconds in known.items():
        others = [other for one, other in known.items() if one != rank]
        if not others:
            return {}
        usual = statistics.median(others)
        if seconds > SLOW_FACTOR * usual and seconds - usual > MIN_SHARE * step_seconds:
            found[rank] = seconds / usual
    return found
