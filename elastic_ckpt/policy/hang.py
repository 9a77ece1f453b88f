"""When a job hangs: every rank has been silent for longer than its phase ever takes.

The limit is learned from the job's own steps. All ranks must exceed it: one that evaluates alone,
or that is still within its limit while it fetches data, excuses those that wait for it. Processes
that are seen at work have longer: a step that compiles again is silent, and is not a hang.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

MIN_HANG_SECONDS: Final = 60.0
"""However short a job's steps are. All limits but that of rare phases are multiples of it."""

SLOW_FACTOR: Final = 5.0
"""While the pace is not known, for fetching (file systems pause for minutes), and while a worker
burns CPU time, which may be its work or a wait for a GPU."""

WORKING_FACTOR: Final = 30.0
"""While something is being done that no waiting process does."""

PACE_SILENCES: Final = 20
"""The pace of a phase is known once this many of its silences have ended."""

RARE_PHASE_SECONDS: Final = 3600.0
"""For phases that are too rare to learn from."""

HANG_FACTOR: Final = 10.0
"""A silence of this multiple of the longest one seen so far is a hang."""

_LEARNED: Final = frozenset({"training", "fetching"})
_RARE: Final = frozenset({"loading", "saving", "evaluating", "between"})


class Effort(Enum):
    """What silent workers are seen to do from outside."""

    IDLE = 1.0
    SPINNING = SLOW_FACTOR  # CPU time of the workers alone; a wait for a GPU looks the same
    WORKING = WORKING_FACTOR  # their children work, they read, write, or touch new memory


@dataclass(frozen=True)
class Silence:
    """How long a rank has been silent, and in which phase.

    Attributes:
        phase: what it is doing, as ``status`` shows it.
        entered: the step that it last started.
        idle_seconds: time since its last heartbeat.
        has_stepped: whether it has finished a step of this incarnation: the first one compiles.
    """

    rank: int
    phase: str
    entered: int
    idle_seconds: float
    has_stepped: bool


@dataclass
class HangDetector:
    """The limits learned from a job.

    Attributes:
        least_seconds: a shorter silence is never a hang.
        longest: the longest silence by phase that ended by itself, in seconds.
        seen: the number of such silences by phase.
    """

    least_seconds: float = MIN_HANG_SECONDS
    longest: dict[str, float] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    def learn(self, silence: Silence) -> None:
        """Record a silence that ended by itself."""
        if silence.has_stepped and silence.phase in _LEARNED:
            longest = self.longest.get(silence.phase, 0.0)
            self.longest[silence.phase] = max(longest, silence.idle_seconds)
            self.seen[silence.phase] = self.seen.get(silence.phase, 0) + 1

    def limit_seconds(self, silence: Silence, effort: Effort = Effort.IDLE) -> float:
        """Return how long this silence may last; infinite if its phase has no limit."""
        phase = silence.phase
        if phase in _RARE or (phase in _LEARNED and not silence.has_stepped):
            return effort.value * max(self.least_seconds, RARE_PHASE_SECONDS)
        if phase in _LEARNED:
            known = phase != "fetching" and self.seen.get(phase, 0) >= PACE_SILENCES
            factor = max(effort.value, 1.0 if known else SLOW_FACTOR)
            return max(factor * self.least_seconds, HANG_FACTOR * self.longest.get(phase, 0.0))
        return math.inf

    def hangs(self, silences: Iterable[Silence], effort: Effort = Effort.IDLE) -> bool:
        """Whether every rank exceeds its limit."""
        found = list(silences)
        return bool(found) and all(
            one.idle_seconds > self.limit_seconds(one, effort) for one in found
        )


@dataclass(frozen=True)
class StalledNode:
    """What a node saw of its hanging ranks.

    Attributes:
        silences: one per rank.
        waiting: ranks that were inside a collective, where they wait for others.
        lines: the innermost line of the script itself, by rank.
        unread: why a stack could not be read; empty if all were.
        node: its name, for the job's other nodes.
    """

    silences: tuple[Silence, ...]
    waiting: tuple[int, ...]
    lines: dict[int, str]
    node: str = ""
    unread: str = ""


@dataclass(frozen=True)
class Hang:
    """A hang of the whole job.

    Attributes:
        rank: the rank to blame; -1 if unknown.
        message: one line.
        node: the rank's; empty if unknown.
        stacks: where each rank's stack is, or why there is none, for the end of the message.
    """

    rank: int
    message: str
    node: str = ""
    stacks: str = ""

    @classmethod
    def of(cls, nodes: Sequence[StalledNode]) -> Hang:
        """Combine what all nodes saw."""
        silences = [silence for node in nodes for silence in node.silences]
        rank = culprit(silences, [one for node in nodes for one in node.waiting])
        idle = min(silence.idle_seconds for silence in silences)
        step = max(silence.entered for silence in silences)
        where = next((node.lines[rank] for node in nodes if rank in node.lines), "")
        message = f"no progress for {idle:.0f} s in step {step}"
        ranks = {silence.rank: node.node for node in nodes for silence in node.silences}
        unread = next((node.unread for node in nodes if node.unread), "")
        stacks = f"; {unread}" if unread else "; elastic-ckpt report shows each rank's stack"
        message = f"{message}: {where}" if where else message
        return cls(rank, message, ranks.get(rank, ""), stacks)


def culprit(silences: Sequence[Silence], waiting: Iterable[int]) -> int:
    """Return the rank that the others wait for; -1 if unknown.

    It is the rank that is one step late; else the one in another phase; else the only one that is
    not inside a collective.

    Args:
        waiting: ranks that were inside a collective, where they wait for others.
    """
    earliest = min(one.entered for one in silences)
    late = [one for one in silences if one.entered == earliest]
    if len(late) < len(silences):
        return late[0].rank
    apart = [one for one in silences if one.phase != "training"]
    if 0 < len(apart) < len(silences):
        return apart[0].rank
    blocked = set(waiting)
    awake = [one for one in silences if one.rank not in blocked]
    return awake[0].rank if 0 < len(awake) < len(silences) else -1
