"""The market of failures: what failed how often, by cause and by node, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from elastic_ckpt.cli.report.material import Material
from elastic_ckpt.cli.report.words import CAUSES, CLASSES
from elastic_ckpt.journal.cost import Cost
from elastic_ckpt.journal.history_types import Cause, Interruption

By = Literal["cause", "node"]

MAX_ROWS: Final = 40
"""Rows of each half; what is rarest is left out, and counted in the last row."""

_UNKNOWN_NODE: Final = "not known"
_REST: Final = "all others"


@dataclass(frozen=True)
class MarketRow:
    """All interruptions of one cause, or of one node. Times are seconds.

    Attributes:
        count: number of interruptions.
        lost_steps: of those for which it is known.
        seconds: of lost work, recovery and waiting together.
    """

    by: By
    name: str
    count: int
    lost_steps: int
    lost_seconds: float
    recovery_seconds: float
    waiting_seconds: float

    @property
    def seconds(self) -> float:
        """The sum of the three."""
        return self.lost_seconds + self.recovery_seconds + self.waiting_seconds


def market_rows(material: Material) -> list[MarketRow]:
    """Return the rows by cause, then those by node, the most expensive first.

    Interruptions on purpose (regroupings) count too, as they cost time.
    """
    pairs = list(zip(material.history.interruptions, material.costs, strict=True))
    return [*_grouped("cause", pairs, cause_of), *_grouped("node", pairs, _node)]


def shown_rows(rows: Sequence[MarketRow]) -> list[MarketRow]:
    """Return the rows for the page: none where each would repeat a line of another table.

    That is where nothing happened twice; and by node, where one node had everything.
    """
    nodes = sum(row.by == "node" for row in rows)
    if all(row.count == 1 for row in rows if row.by == "cause"):
        return []
    return [row for row in rows if row.by == "cause" or nodes > 1]


def cause_of(one: Interruption) -> str:
    """Return the cause in words: a failure's class, a preemption with its source."""
    if one.cause is Cause.PREEMPTION:
        return f"preemption, {one.kind}" if one.kind else CAUSES[one.cause]
    return (CLASSES.get(one.kind, one.kind) if one.kind else "") or CAUSES[one.cause]


def _node(one: Interruption) -> str:
    return one.node or _UNKNOWN_NODE


def _grouped(
    by: By, pairs: Iterable[tuple[Interruption, Cost]], name_of: Callable[[Interruption], str]
) -> list[MarketRow]:
    groups: dict[str, list[Cost]] = {}
    for one, cost in pairs:
        groups.setdefault(name_of(one), []).append(cost)
    rows = [_row(by, name, found) for name, found in groups.items()]
    rows.sort(key=lambda row: (-row.seconds, -row.count, row.name))
    if len(rows) <= MAX_ROWS:
        return rows
    kept = {row.name for row in rows[: MAX_ROWS - 1]}
    rest = [cost for name, found in groups.items() if name not in kept for cost in found]
    return [*rows[: MAX_ROWS - 1], _row(by, _REST, rest)]


def _row(by: By, name: str, found: list[Cost]) -> MarketRow:
    return MarketRow(
        by, name, len(found),
        sum(cost.lost_steps or 0 for cost in found),
        sum(cost.lost_seconds for cost in found),
        sum(cost.recovery_seconds for cost in found),
        sum(cost.waiting_seconds for cost in found),
    )  # fmt: skip
