"""What the report's tables list, as values; the template formats them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from elastic_ckpt.cli.report.material import Material
from elastic_ckpt.cli.report.words import CATEGORIES, exact, rounded, unit_of
from elastic_ckpt.errors import ExitCode
from elastic_ckpt.journal.cost import Cost
from elastic_ckpt.journal.history_types import (
    Incarnation,
    Interruption,
    NoticeKind,
    PastNotice,
    PastSave,
)
from elastic_ckpt.journal.time_account import Category
from elastic_ckpt.util.text import printable

MAX_ROWS: Final = 150
"""Rows of a table: the newest are listed, all are counted."""

T = TypeVar("T")


def newest(rows: Sequence[T]) -> Sequence[T]:
    """Return the rows that are listed."""
    return rows[-MAX_ROWS:]


@dataclass(frozen=True)
class TimeRow:
    """A category of time.

    Attributes:
        shown: its time, rounded so that the table adds up.
        left, width: per cent of the bar.
    """

    category: Category
    label: str
    what: str
    seconds: float
    shown: str
    left: float
    width: float


def time_rows(material: Material) -> list[TimeRow]:
    """Return all categories, in the order of the bar."""
    found = material.goodput
    seconds = [found.seconds(category) for category in CATEGORIES]
    whole = found.wall_seconds
    parts = rounded(seconds, unit_of(whole))
    left, rows = 0.0, []
    for index, (category, (label, what)) in enumerate(CATEGORIES.items()):
        width = 100 * seconds[index] / whole if whole > 0 else 0.0
        rows.append(
            TimeRow(
                category, label, what, seconds[index], exact(parts[index] or seconds[index], whole),
                round(left, 3), round(width, 3),
            )
        )  # fmt: skip
        left += width
    return rows


def failure_rows(
    material: Material,
) -> list[tuple[str, Interruption, Cost, Incarnation | None]]:
    """Return the newest failures in order of time: label, cost, and who trained next."""
    starts = {one.first_step_at: one for one in material.history.incarnations}
    return [
        (label, one, cost, starts.get(cost.back_at) if cost.back_at is not None else None)
        for label, one, cost in newest(material.failures)
    ]


def notice_rows(material: Material) -> Sequence[tuple[str, PastNotice, str, int | None, Cost]]:
    """Return the newest notices in order of time.

    Each with its label, how its run ended, the exit code, and a preemption's cost at its first.
    """
    uncharged = {one.run: cost for one, cost in material.preemptions}
    rows = []
    for number, one in enumerate(material.history.notices, 1):
        leaves = one.kind is NoticeKind.NOTICE and not one.follows
        cost = uncharged.pop(one.run, None) if leaves and one.run is not None else None
        rows.append((f"N{number}", one, *_outcome(one, material), cost or Cost()))
    return newest(rows)


def _outcome(one: PastNotice, material: Material) -> tuple[str, int | None]:
    """Return how the run that received the notice ended, and its exit code."""
    if one.follows:
        return "the other nodes continued", None
    if one.kind is NoticeKind.WARNING:
        return "training continued", None
    if one.kind is NoticeKind.HELD:
        return "nothing was started", None
    if one.run is None:
        return "-", None
    run = material.history.runs[one.run]
    if run.ended is None:
        return "leaving now", None
    if run.killed:
        return "killed early", None
    words = {
        ExitCode.FINISHED: "finished first",
        ExitCode.PREEMPTED_SAVED: "saved",
        ExitCode.PREEMPTED_UNSAVED: "nothing new saved",
    }
    found = next((text for code, text in words.items() if code == run.exit_code), "failed")
    return found, run.exit_code


def refused_rows(material: Material) -> list[tuple[str, float | None, str, bool]]:
    """Return name, time, reason and presence of what the journal recorded or quarantine holds.

    The time is None where only quarantine knows of it.
    """
    kept = {view.path.name for view in material.set_aside}
    recorded = newest(material.history.refused)
    names = {Path(one.to).name for one in recorded}
    return [
        *((Path(one.path).name, one.at, one.reason, Path(one.to).name in kept) for one in recorded),
        *(
            (printable(view.path.name), None, view.why, True)
            for view in newest(material.set_aside)
            if view.path.name not in names
        ),
    ]


@dataclass(frozen=True)
class SaveRow:
    """All saves of one reason and tier; ``tier`` is empty for those that failed."""

    reason: str
    tier: str
    count: int
    median_seconds: float
    median_stall_seconds: float
    longest_stall_seconds: float
    newest_bytes: int | None


def save_rows(material: Material) -> list[SaveRow]:
    """Return a row for each reason and tier."""
    groups: dict[tuple[str, str], list[PastSave]] = {}
    for save in material.history.saves:
        key = (save.reason or "-", "" if save.error else save.tier or "-")
        groups.setdefault(key, []).append(save)
    rows = []
    for (reason, tier), saves in sorted(groups.items())[:MAX_ROWS]:
        stalls = [save.stall_seconds for save in saves]
        sizes = [save.bytes for save in saves if save.bytes is not None]
        rows.append(
            SaveRow(
                reason, tier, len(saves), statistics.median(save.seconds for save in saves),
                statistics.median(stalls), max(stalls), sizes[-1] if sizes else None,
            )
        )  # fmt: skip
    return rows


def unattributed_seconds(material: Material) -> float:
    """Return the seconds of recovery and waiting that belong to no interruption."""
    found = material.goodput
    own = sum(cost.recovery_seconds + cost.waiting_seconds for cost in material.costs)
    whole = found.seconds(Category.RECOVERY) + found.seconds(Category.WAITING)
    return max(0.0, whole - own)
