"""The rows of the report's tables, as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from elastic_ckpt.cli.report.material import Material
from elastic_ckpt.cli.report.words import (
    CATEGORIES,
    CAUSES,
    CLASSES,
    ENDINGS,
    NOTICES,
    Moment,
    moment,
    plural,
    rounded,
    share,
    span,
)
from elastic_ckpt.errors import ExitCode
from elastic_ckpt.journal.cost import Cost
from elastic_ckpt.journal.history_types import (
    Incarnation,
    Interruption,
    Notice,
    NoticeKind,
    Save,
)
from elastic_ckpt.journal.time_account import Category
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import human_bytes, human_duration

MAX_ROWS: Final = 150
"""The newest are listed; all are counted."""

_MAX_TAILS: Final = 40  # failures whose last lines are shown
_TAIL_LINES: Final = 30
_MESSAGE: Final = 400  # characters

T = TypeVar("T")


def newest(rows: Sequence[T]) -> Sequence[T]:
    """Those that are listed."""
    return rows[-MAX_ROWS:]


def time_rows(material: Material) -> list[TimeRow]:
    """All categories, in the order of the bar; tenths of seconds that add up."""
    found = material.goodput
    seconds = [found.seconds(category) for category in CATEGORIES]
    shown = rounded(seconds, 0.1)
    left, rows = 0.0, []
    for (category, (label, what)), exact, tenths in zip(
        CATEGORIES.items(), seconds, shown, strict=True
    ):
        width = 100 * exact / found.wall_seconds if found.wall_seconds > 0 else 0.0
        rows.append(
            TimeRow(
                category.value, label, what, exact, f"{tenths:,.1f}", span(exact),
                share(exact, found.wall_seconds), round(left, 3), round(width, 3),
            )
        )  # fmt: skip
        left += width
    return rows


def failure_rows(material: Material) -> list[FailureRow]:
    """In order of time."""
    found = newest(material.failures)
    told = {label for label, _, _ in found[-_MAX_TAILS:]}
    return [
        FailureRow(
            label, moment(one.at), _kind(one), _cut(one.message),
            *_lost(cost), *_cost(cost)[1:], _back(cost, material),
            _lines(one) if label in told else [],
        )
        for label, one, cost in found
    ]  # fmt: skip


def notice_rows(material: Material) -> list[NoticeRow]:
    """In order of time; what a preemption cost stands at its first notice."""
    preempted = {one.run: cost for one, cost in material.preemptions}
    rows, charged = [], set()
    for number, one in enumerate(material.history.notices, 1):
        cost = None
        leaves = one.kind is NoticeKind.NOTICE and not one.follows
        if leaves and one.run in preempted and one.run not in charged:
            charged.add(one.run)
            cost = preempted[one.run]
        outcome, code = _outcome(one, material)
        rows.append(
            NoticeRow(
                f"N{number}", moment(one.at), NOTICES[one.kind], one.source, _cut(one.reason),
                "-" if one.grace is None else span(one.grace),
                "-" if one.predicted_seconds is None else span(one.predicted_seconds),
                "-" if one.actual_seconds is None else span(one.actual_seconds),
                "-" if one.saved_step is None else f"step {one.saved_step:,}",
                _cut(one.why) if one.why else "",
                outcome, code, *_cost(cost),
            )
        )  # fmt: skip
    return list(newest(rows))


def checkpoint_rows(material: Material) -> list[CheckpointRow]:
    """The newest first."""
    rows = []
    for view in material.checkpoints:
        manifest = view.manifest
        in_memory = view.tier != "disk"
        rows.append(
            CheckpointRow(
                printable(view.path.name) if not in_memory else f"step {view.step}",
                f"{view.step:,}", str(view.epoch), manifest.reason if manifest else "-", view.tier,
                human_bytes(manifest.total_bytes if manifest else None),
                human_duration(view.age_seconds), view.intact,
                _cut(view.state),
            )
        )  # fmt: skip
    return rows


def refused_rows(material: Material) -> list[RefusedRow]:
    """What the journal tells, and what is in quarantine besides."""
    kept = {view.path.name for view in material.set_aside}
    rows, told = [], set()
    for one in newest(material.history.refused):
        place = Path(one.to).name
        told.add(place)
        still = "in .quarantine" if place in kept else "-"
        rows.append(RefusedRow(Path(one.path).name, moment(one.at), _cut(one.reason), still))
    rows += [
        RefusedRow(printable(view.path.name), None, _cut(view.why), "in .quarantine")
        for view in newest(material.set_aside)
        if view.path.name not in told
    ]
    return rows


def incarnation_rows(material: Material) -> list[IncarnationRow]:
    """In order of time."""
    return [_incarnation(one, material) for one in newest(material.history.incarnations)]


def save_rows(material: Material) -> list[SaveRow]:
    """For each reason and tier, and those that failed."""
    groups: dict[tuple[str, str], list[Save]] = {}
    for save in material.history.saves:
        key = (save.reason or "-", "failed" if save.error else save.tier or "-")
        groups.setdefault(key, []).append(save)
    rows = []
    for (reason, tier), saves in sorted(groups.items())[:MAX_ROWS]:
        stalls = [save.stall_seconds for save in saves]
        sizes = [save.bytes for save in saves if save.bytes is not None]
        failed = tier == "failed"
        rows.append(
            SaveRow(
                reason, tier, f"{len(saves):,}",
                "-" if failed else span(statistics.median(save.seconds for save in saves)),
                span(statistics.median(stalls)), span(max(stalls)),
                human_bytes(sizes[-1] if sizes else None),
            )
        )  # fmt: skip
    return rows


def incident_rows(material: Material) -> list[IncidentRow]:
    """In order of time."""
    return [
        IncidentRow(moment(one.at), one.what.replace("_", " "), _cut(one.text))
        for one in newest(material.history.incidents)
    ]


def _incarnation(one: Incarnation, material: Material) -> IncarnationRow:
    ended = material.ended if one.ended is None else one.ended
    trained = "-" if one.first_step_at is None else span(ended - one.first_step_at)
    says = ENDINGS.get(one.kind, one.kind)
    return IncarnationRow(
        str(one.number), moment(one.launched), str(one.ranks or "-"),
        _origin(one),
        "-" if one.reached_step is None else f"step {one.reached_step:,}", trained,
        f"{says}: {_cut(one.message)}" if one.message else says,
    )  # fmt: skip


def _lost(cost: Cost) -> tuple[str, str]:
    """Seconds, and steps."""
    steps = plural(cost.lost_steps, "step") if cost.lost_steps else ""
    return _cost(cost)[0], steps


def _back(cost: Cost, material: Material) -> str:
    """What the next first step went on from."""
    incarnations = material.history.incarnations
    found = next((one for one in incarnations if one.first_step_at == cost.back_at), None)
    if cost.back_at is None or found is None:
        return "not by itself"
    return _origin(found)


def _origin(one: Incarnation) -> str:
    step = f"step {one.from_step or 0:,}"
    return f"{step}, {one.tier}" if one.tier else step


def _lines(one: Interruption) -> list[str]:
    return [*one.tail[-_TAIL_LINES:], *one.stacks[:_TAIL_LINES]]


def _kind(one: Interruption) -> str:
    """``rank 1, signal: killed by a signal``."""
    rank = f"rank {one.rank}, " if one.rank >= 0 else ""
    words = CLASSES.get(one.kind, "")
    also = f": {words}" if words and words != one.kind else ""
    return f"{rank}{one.kind or CAUSES[one.cause]}{also}"


def _cut(text: str) -> str:
    """Of a long message the beginning; the journal has all of it."""
    return (text if len(text) <= _MESSAGE else f"{text[:_MESSAGE]}...") or "-"


def _outcome(one: Notice, material: Material) -> tuple[str, str]:
    """What became of the run that heard it, and its exit code."""
    if one.follows:
        return "the others went on", ""
    if one.kind is NoticeKind.WARNING:
        return "trained on", ""
    if one.kind is NoticeKind.HELD:
        return "nothing was started before", ""
    if one.run is None:
        return "-", ""
    run = material.history.runs[one.run]
    if run.ended is None:
        return "leaves now", ""
    if run.killed:
        return "gone before its end", ""
    words = {
        ExitCode.FINISHED: "finished first",
        ExitCode.PREEMPTED_SAVED: "saved",
        ExitCode.PREEMPTED_UNSAVED: "nothing new saved",
    }
    said = next((text for code, text in words.items() if code == run.exit_code), "failed")
    return said, f"exit code {run.exit_code}"


def _cost(cost: Cost | None) -> tuple[str, str, str]:
    """Lost, recovery, waiting; under a millisecond is nothing."""
    if cost is None:
        return "-", "-", "-"
    parts = (cost.lost_seconds, cost.recovery_seconds, cost.waiting_seconds)
    lost, recovery, waiting = (span(part) if part >= 0.001 else "-" for part in parts)
    return lost, recovery, waiting


def waits_apart(material: Material) -> float:
    """Seconds of recovery and waiting that belong to no interruption."""
    found = material.goodput
    own = sum(cost.recovery_seconds + cost.waiting_seconds for cost in material.costs)
    whole = found.seconds(Category.RECOVERY) + found.seconds(Category.WAITING)
    return max(0.0, whole - own)


@dataclass(frozen=True)
class TimeRow:
    """A category of time; ``left`` and ``width`` are per cent of the bar."""

    name: str
    label: str
    what: str
    seconds: float
    shown: str
    human: str
    share: str
    left: float
    width: float


@dataclass(frozen=True)
class FailureRow:
    """A failure and what it cost."""

    label: str
    at: Moment
    kind: str
    message: str
    lost: str
    steps: str
    recovery: str
    waiting: str
    back: str
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class NoticeRow:
    """A notice, what became of it, and what the leaving and coming back cost."""

    label: str
    at: Moment
    kind: str
    source: str
    reason: str
    grace: str
    predicted: str
    actual: str
    saved: str
    why: str
    outcome: str
    code: str
    lost: str
    recovery: str
    waiting: str


@dataclass(frozen=True)
class CheckpointRow:
    """A checkpoint as it is on its tier now."""

    name: str
    step: str
    epoch: str
    reason: str
    tier: str
    size: str
    age: str
    intact: bool
    state: str


@dataclass(frozen=True)
class RefusedRow:
    """A checkpoint that was not used, or set aside."""

    name: str
    at: Moment | None
    reason: str
    kept: str


@dataclass(frozen=True)
class IncarnationRow:
    """One launch of all workers."""

    number: str
    at: Moment
    ranks: str
    begins: str
    reached: str
    trained: str
    ended: str


@dataclass(frozen=True)
class SaveRow:
    """Saves of one reason and tier."""

    reason: str
    tier: str
    count: str
    seconds: str
    stall: str
    worst: str
    size: str


@dataclass(frozen=True)
class IncidentRow:
    """Anything else."""

    at: Moment
    what: str
    text: str
