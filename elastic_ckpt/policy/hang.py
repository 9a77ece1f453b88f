"""When a job hangs: no rank has done anything for longer than what it does ever takes.

The time is learnt from the job's own steps. All ranks must be over it: one that evaluates alone, or
waits for its data within its limit, excuses those that wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

LEAST_SECONDS: Final = 300.0
"""Whatever a job's steps take: file systems and networks pause for minutes and come back."""

LONG_SECONDS: Final = 3600.0
"""For what is done seldom, and of which nothing can be learnt beforehand."""

FACTOR: Final = 10.0
"""What is taken for a hang, in longest times that were seen."""

_LEARNT: Final = frozenset({"training", "fetching"})
_SELDOM: Final = frozenset({"loading", "saving", "evaluating", "between"})


@dataclass(frozen=True)
class Pace:
    """Where a rank is.

    Attributes:
        rank: its global number.
        phase: what it is doing, as ``status`` shows it.
        entered: the step that it has begun.
        idle_seconds: since it last said something.
        has_stepped: whether it has finished a step of this incarnation: the first one compiles.
    """

    rank: int
    phase: str
    entered: int
    idle_seconds: float
    has_stepped: bool


@dataclass
class Paces:
    """What was learnt of a job.

    Attributes:
        least_seconds: no shorter silence is a hang.
        longest: silence by phase, in seconds, that came to an end by itself.
    """

    least_seconds: float = LEAST_SECONDS
    longest: dict[str, float] = field(default_factory=dict)

    def learn(self, pace: Pace) -> None:
        """A rank went on after this silence."""
        if pace.has_stepped and pace.phase in _LEARNT:
            self.longest[pace.phase] = max(self.longest.get(pace.phase, 0.0), pace.idle_seconds)

    def limit_seconds(self, pace: Pace) -> float:
        """The longest silence that is no hang; infinite where nobody can know."""
        if pace.phase in _SELDOM or (pace.phase in _LEARNT and not pace.has_stepped):
            return max(self.least_seconds, LONG_SECONDS)
        if pace.phase in _LEARNT:
            return max(self.least_seconds, FACTOR * self.longest.get(pace.phase, 0.0))
        return math.inf

    def hangs(self, paces: Iterable[Pace]) -> bool:
        """Whether every rank is over its limit."""
        found = list(paces)
        return bool(found) and all(one.idle_seconds > self.limit_seconds(one) for one in found)


@dataclass(frozen=True)
class Stuck:
    """What was seen of the ranks of a node that hang.

    Attributes:
        paces: where they are.
        waiting: those that were inside of a collective, where one waits for others.
        places: the innermost line of the script's own, by rank.
    """

    paces: tuple[Pace, ...]
    waiting: tuple[int, ...]
    places: dict[int, str]


@dataclass(frozen=True)
class Hang:
    """A hang of a whole job.

    Attributes:
        rank: the culprit; -1 if nothing tells.
        message: one line.
    """

    rank: int
    message: str

    @classmethod
    def of(cls, nodes: Sequence[Stuck]) -> Hang:
        """What all nodes' ranks come to."""
        paces = [pace for stuck in nodes for pace in stuck.paces]
        rank = culprit(paces, [one for stuck in nodes for one in stuck.waiting])
        idle = min(pace.idle_seconds for pace in paces)
        step = max(pace.entered for pace in paces)
        where = next((stuck.places[rank] for stuck in nodes if rank in stuck.places), "")
        message = f"nothing happened for {idle:.0f} s in step {step}"
        return cls(rank, f"{message}: {where}" if where else message)


def culprit(paces: Sequence[Pace], waiting: Iterable[int]) -> int:
    """The rank that the others wait for; -1 if nothing tells.

    Args:
        waiting: ranks that were seen inside of a collective, where one waits for others.

    One that is a step behind is it; else one that does something else; else the only one of all
    that does not wait.
    """
    behind = min(one.entered for one in paces)
    late = [one for one in paces if one.entered == behind]
    if len(late) < len(paces):
        return late[0].rank
    apart = [one for one in paces if one.phase != "training"]
    if 0 < len(apart) < len(paces):
        return apart[0].rank
    stuck = set(waiting)
    awake = [one for one in paces if one.rank not in stuck]
    return awake[0].rank if 0 < len(awake) < len(paces) else -1
