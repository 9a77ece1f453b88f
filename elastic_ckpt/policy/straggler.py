"""Which rank is slower than the others, in what it does itself.

Ranks of synchronous training take equally long for a step: the fast ones wait for the slow one. So
what is compared is the time that each spends on its own batch, the waiting left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Final

SLOW_FACTOR: Final = 1.3
"""Times the median of the others from which a rank is called slow."""

LEAST_SHARE: Final = 0.1
"""Of the step that it must cost: what nobody would notice is not worth a word."""


def stragglers(busy: Mapping[int, float], step_seconds: float) -> dict[int, float]:
    """Slow ranks, and how many times as long as the others' median theirs takes.

    Args:
        busy: seconds of a step that each rank spends on its own work; 0 where nobody knows.
        step_seconds: a whole step.
    """
    known = {rank: seconds for rank, seconds in busy.items() if seconds > 0}
    found: dict[int, float] = {}
    for rank, seconds in known.items():
        others = [other for one, other in known.items() if one != rank]
        if not others:
            return {}
        usual = statistics.median(others)
        if seconds > SLOW_FACTOR * usual and seconds - usual > LEAST_SHARE * step_seconds:
            found[rank] = seconds / usual
    return found
