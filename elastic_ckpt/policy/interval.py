"""Save intervals, and ``--save-interval auto``.

A save costs its stall; a failure costs the work since the last save. The interval that minimizes
the sum was found by Young ("A first order approximation to the optimum checkpoint interval", CACM
17(9), 1974) and, for saves that are not short compared to the time between failures, by Daly ("A
higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006).
Young's is the limit of Daly's for short saves.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from elastic_ckpt.errors import UsageError
from elastic_ckpt.util.units import human_duration, parse_duration

DEFAULT_MTBF_SECONDS: Final = 6 * 3600.0
"""The default: a node that is preempted a few times a day."""

MAX_INTERVAL_SECONDS: Final = 3600.0
"""Beyond this a save costs next to nothing, and the estimate may be wrong."""

MIN_INTERVAL_SECONDS: Final = 1.0
"""The supervisor checks its clock a few times a second."""

MAX_SAVE_SHARE: Final = 0.05
"""Maximum share of the time spent in saves, however often the job fails."""

FIRST_SAVE_SECONDS: Final = 60.0
"""When the first save is requested; it measures the cost of a save."""

HYSTERESIS: Final = 0.1
"""A change of at most this share of the interval is ignored as noise."""


@dataclass(frozen=True)
class OptimalInterval:
    """How often to save, in seconds from the start of a save to the next, and why in a sentence."""

    seconds: float
    why: str


FIRST_INTERVAL: Final = OptimalInterval(
    FIRST_SAVE_SECONDS,
    f"first save after {human_duration(FIRST_SAVE_SECONDS)}, to measure what a save costs",
)


def estimate_mtbf(prior: float, observed_seconds: float, failures: int) -> float:
    """Return the mean time between failures in seconds, from a prior and what was observed.

    The prior counts as one failure after ``prior`` seconds, so it fades with the first few that
    are observed (the mean of a gamma prior of that weight under exponential times to failure).

    Args:
        prior: expected seconds between failures.
        observed_seconds: time spent training.
        failures: events in that time that lost work; see ``journal/failure_rate.py``.
    """
    return (prior + observed_seconds) / (1 + failures)


def daly_interval(save_seconds: float, mtbf: float) -> float:
    """Return Daly's higher-order optimum: seconds from the start of one save to the next.

    Daly counts from the end of a save to the start of the next, so the save itself is added.
    """
    ratio = save_seconds / (2 * mtbf)
    if ratio >= 1:
        return mtbf + save_seconds
    return math.sqrt(2 * save_seconds * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9)


def optimal_interval(
    save_seconds: float, mtbf: float, current: float | None = None
) -> OptimalInterval:
    """Return the interval to save at.

    Saves never take more than ``MAX_SAVE_SHARE`` of the time; if that permits, the interval is at
    most ``MAX_INTERVAL_SECONDS``.

    Args:
        save_seconds: how long training stalls for one save.
        mtbf: seconds between two failures, positive.
        current: the interval so far, kept if the new one is about the same.
    """
    least = max(MIN_INTERVAL_SECONDS, save_seconds / MAX_SAVE_SHARE)
    best = daly_interval(save_seconds, mtbf)
    seconds = max(least, min(best, MAX_INTERVAL_SECONDS))
    if current is not None and abs(seconds - current) <= HYSTERESIS * current:
        seconds = max(least, current)
    limit = ""
    if best < save_seconds / MAX_SAVE_SHARE:
        limit = f", to spend at most {MAX_SAVE_SHARE:.0%} of the time in saves"
    elif best > MAX_INTERVAL_SECONDS:
        limit = ", the longest interval"
    why = (
        f"every {human_duration(seconds)}{limit}: a save costs {human_duration(save_seconds)} "
        f"and the job fails every {human_duration(mtbf)}"
    )
    return OptimalInterval(seconds, why)


@dataclass(frozen=True)
class SaveInterval:
    """A save interval in steps, in seconds, or automatic; with none of them, never.

    Attributes:
        auto: derive the seconds from the cost of a save and the failure rate.
    """

    steps: int = 0
    seconds: float = 0.0
    auto: bool = False

    def __str__(self) -> str:
        """Return the interval as a command line would give it."""
        if self.auto:
            return "auto"
        if self.steps:
            return f"{self.steps} steps"
        return f"{self.seconds:g}s" if self.seconds else "set by the script"

    @property
    def is_given(self) -> bool:
        """Whether it is any interval; if not, the script's counts, and without one ``auto``."""
        return bool(self.steps or self.seconds or self.auto)

    @property
    def worker_interval(self) -> int:
        """The interval that the workers receive, in steps.

        0 leaves the script's own interval. -1 disables it: for an interval in seconds the
        supervisor requests each save.
        """
        return -1 if self.seconds or self.auto else self.steps

    def due(self, step: int) -> bool:
        """Whether to save after this step; depends on the step alone, so all ranks agree."""
        return self.steps > 0 and step > 0 and step % self.steps == 0


def parse_interval(text: str) -> SaveInterval:
    """Parse ``100`` (steps), a duration with its unit (``90s``, ``10m``) or ``auto``.

    Raises:
        UsageError: the text has none of these forms.
    """
    given = text.strip()
    if given == "auto":
        return SaveInterval(auto=True)
    if re.fullmatch(r"\d{1,12}", given, re.ASCII):
        return SaveInterval(steps=int(given))
    try:
        if not given[-1:].isalpha():
            raise UsageError("without a unit")
        return SaveInterval(seconds=parse_duration(given))
    except UsageError:
        raise UsageError(
            f"invalid --save-interval {text!r}: give steps (100), a time with its unit (90s, 10m) "
            "or auto"
        ) from None
