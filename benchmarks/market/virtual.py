"""What a market costs in real time, by arithmetic over its whole trace, with measured costs.

Assumptions, which the page repeats: a recovery and a save take what they took on the hosts, however
many nodes there are; all nodes train at one speed; a change within a recovery begins it anew; the
interval between saves is the one that Young and Daly's formula gives for that market and that cost
of a save.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

from market.traces import Change

SHORTEST_SECONDS = 5.0
"""Between two saves."""


@dataclass(frozen=True)
class Costs:
    """Of one contender, in seconds; from the runs on hosts.

    Attributes:
        lost, left, came: from the end of a node, its notice, or its coming until all train.
        stall: how long training stands still for a save.
        keeps_on_loss: whether nothing is lost with a node, as the others go on from where they are.
        keeps_on_notice: whether nothing is lost when a node leaves with notice.
        keeps_on_coming: whether nothing is lost when a node comes.
        in_memory: whether the newest save is only in memory, a node's and its peer's: where several
            nodes go at once, the one before it counts.
    """

    lost: float
    left: float
    came: float
    stall: float
    keeps_on_notice: bool
    keeps_on_coming: bool
    in_memory: bool
    keeps_on_loss: bool = False

    def of(self, change: Change) -> float:
        """How long the job stands still for it."""
        return self.came if change.comes else self.left if change.notice else self.lost

    def keeps(self, change: Change) -> bool:
        """Whether what was done since the last save is kept."""
        if change.comes:
            return self.keeps_on_coming
        return self.keeps_on_loss or (bool(change.notice) and self.keeps_on_notice)


def interval(changes: list[Change], costs: Costs) -> float:
    """The best time between two saves: Young and Daly, sqrt(2 x stall x time between losses)."""
    moments = {change.at for change in changes[1:] if not costs.keeps(change)}
    between = changes[-1].at / max(1, len(moments))
    return max(SHORTEST_SECONDS, math.sqrt(2 * costs.stall * between))


def goodput(changes: list[Change], costs: Costs) -> float:
    """The share of the nodes' time that is in the state at the end of the trace."""
    every = interval(changes, costs)
    speed = 1.0 / (1.0 + costs.stall / every)
    nodes, since, resumed = 0, 0.0, 0.0
    available = useful = 0.0
    for at, group in groupby(changes, key=lambda change: change.at):
        now = list(group)
        available += nodes * (at - since)
        trained = max(0.0, at - resumed)
        if not all(costs.keeps(change) for change in now):
            several = sum(not costs.keeps(change) for change in now) > 1
            again = trained % every + every * (several and costs.in_memory)
            trained = max(0.0, trained - again)
        useful += nodes * trained * speed
        nodes += sum(1 if change.comes else -1 for change in now)
        since, resumed = at, at + max(costs.of(change) for change in now)
    return useful / available if available else 0.0
