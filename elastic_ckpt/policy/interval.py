"""``--save-interval auto``: how often a save costs less than the work that it keeps.

A save every now and then costs its stall; a failure costs what was done since the last save. The
interval at which the two together are least was found by Young ("A first order approximation to
the optimum checkpoint interval", CACM 17(9), 1974) and, for saves that are not short against the
time between failures, by Daly ("A higher order estimate of the optimum checkpoint interval for
restart dumps", FGCS 22(3), 2006). Of Daly's estimate Young's is the limit for short saves.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from elastic_ckpt.errors import UsageError
from elastic_ckpt.util.units import human_duration

DEFAULT_MTBF_SECONDS: Final = 6 * 3600.0
"""Where nobody gives one: a node that is taken away some times a day."""

LONGEST_SECONDS: Final = 3600.0
"""Beyond that a save costs next to nothing, and the estimate may be wrong."""

SHORTEST_SECONDS: Final = 1.0
"""The supervisor looks at its clock a few times a second."""

MOST_SAVING: Final = 0.05
"""Share of the time that may go into saves, whatever the failures."""

FIRST_SAVE_SECONDS: Final = 60.0
"""When the first save is asked for, which shows what one costs."""

HYSTERESIS: Final = 0.1
"""A change by no more than this share of the interval is noise."""


@dataclass(frozen=True)
class OptimalInterval:
    """How often to save.

    Attributes:
        seconds: from the beginning of one save to the beginning of the next.
        why: one sentence for people.
    """

    seconds: float
    why: str


FIRST_INTERVAL: Final = OptimalInterval(
    FIRST_SAVE_SECONDS,
    f"the first after {human_duration(FIRST_SAVE_SECONDS)}: it will show what a save costs",
)


def estimate_mtbf(prior: float, observed_seconds: float, failures: int) -> float:
    """Mean time between failures: what was expected, outweighed more and more by what was seen.

    The prior stands for one failure after ``prior`` seconds, so that it fades with the first few
    that are counted (the mean of a gamma prior of that weight under exponential times to failure).

    Args:
        prior: seconds between failures that were expected beforehand.
        observed_seconds: time in which the job trained.
        failures: events in it that threw work away; see ``journal/failure_rate.py``.

    Returns:
        Seconds.
    """
    return (prior + observed_seconds) / (1 + failures)


def daly_interval(save_seconds: float, mtbf: float) -> float:
    """Daly's higher-order optimum, from the beginning of one save to that of the next, in seconds.

    Daly counts from the end of a save to the beginning of the next; the save itself is added.
    """
    ratio = save_seconds / (2 * mtbf)
    if ratio >= 1:
        return mtbf + save_seconds
    return math.sqrt(2 * save_seconds * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9)


def optimal_interval(
    save_seconds: float, mtbf: float, current: float | None = None
) -> OptimalInterval:
    """The interval to save at.

    Saving never takes more than ``MOST_SAVING`` of the time; where that allows it, the interval is
    ``LONGEST_SECONDS`` at most.

    Args:
        save_seconds: how long training stands still for one save.
        mtbf: seconds between two failures, positive.
        current: the interval so far, which stays if the new one is about the same.
    """
    least = max(SHORTEST_SECONDS, save_seconds / MOST_SAVING)
    best = daly_interval(save_seconds, mtbf)
    seconds = max(least, min(best, LONGEST_SECONDS))
    if current is not None and abs(seconds - current) <= HYSTERESIS * current:
        seconds = max(least, current)
    limit = ""
    if best < save_seconds / MOST_SAVING:
        limit = f", for at most {MOST_SAVING:.0%} of the time to go into saves"
    elif best > LONGEST_SECONDS:
        limit = ", the longest interval"
    why = (
        f"every {human_duration(seconds)}{limit}: a save costs {human_duration(save_seconds)} "
        f"and the job fails every {human_duration(mtbf)}"
    )
    return OptimalInterval(seconds, why)


@dataclass(frozen=True)
class SaveInterval:
    """One of the three at most; none of them means never.

    Attributes:
        steps: optimizer steps between saves.
        seconds: seconds between saves.
        auto: seconds, found from what a save costs and how often the job fails.
    """

    steps: int = 0
    seconds: float = 0.0
    auto: bool = False

    def __str__(self) -> str:
        """For people."""
        if self.auto:
            return "auto"
        if self.steps:
            return f"{self.steps} steps"
        return f"{self.seconds:g}s" if self.seconds else "as the script says"

    @property
    def told_steps(self) -> int:
        """What the ranks are told: 0 leaves the script's own interval, as nothing was asked for.

        Of one in seconds the supervisor asks for each save, and -1 keeps the script from its own.
        """
        return -1 if self.seconds or self.auto else self.steps

    def due(self, step: int) -> bool:
        """Whether a save follows from the step number alone, alike on every rank."""
        return self.steps > 0 and step > 0 and step % self.steps == 0


def parse_interval(text: str) -> SaveInterval:
    """Read ``100`` (steps), ``90s`` (seconds) or ``auto``.

    Raises:
        UsageError: the text is none of them.
    """
    if text.strip() == "auto":
        return SaveInterval(auto=True)
    match = re.fullmatch(r"(\d{1,12})|(\d{1,12}(?:\.\d{1,9})?)s", text.strip(), re.ASCII)
    if match is None:
        raise UsageError(
            f"--save-interval {text!r} is neither steps (100) nor seconds (90s) nor auto"
        )
    if match[1] is not None:
        return SaveInterval(steps=int(match[1]))
    return SaveInterval(seconds=float(match[2]))
