"""The report's timeline: a row for each hour, day or other period, with its events."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from elastic_ckpt.cli.report.material import Material
from elastic_ckpt.cli.report.words import (
    ENDINGS,
    NOTICES,
    Moment,
    moment,
    offset,
    plural,
    span,
)
from elastic_ckpt.journal.history_types import Cause, Incarnation, NoticeKind, PastSave
from elastic_ckpt.journal.time_account import Category, Span

_PERIODS: Final = (
    1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400,
    7 * 86400, 14 * 86400, 28 * 86400,
)  # fmt: skip
"""Possible lengths of a row, in seconds."""

_LENGTHS: Final = (
    1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 60, 80, 120, 180, 240, 360, 480, 600, 720, 960, 1200,
    1800, 2400, 3600, 4800, 7200, 10800, 14400, 21600, 28800, 43200, 57600, 86400, 115200, 172800,
    259200, 345600, 432000, 518400, 604800, 608400,
)  # fmt: skip
"""Possible lengths of a single row, in seconds; a quarter of each is a round number."""

_MAX_ROWS: Final = 32
_PER_ROW: Final = 3  # labelled marks, roughly
_WIDTH: Final = 1000  # of a row's drawing
_CHARACTER_PERCENT: Final = 2.6  # of a row's width on a phone
_LANES: Final = 2
_MAX_MARKS: Final = 1000  # of all rows
_TITLE: Final = 80  # characters of a message
_MAX_BOXES: Final = 1000  # of all rows
_LABELLED_PERCENT: Final = 6.0  # width from which a box fits a number


@dataclass(frozen=True)
class Mark:
    """An event in a row: a glyph, and a label if there is room.

    Attributes:
        left: per cent of the row's width.
        lane: of the label; -1 for none.
    """

    left: float
    kind: str
    label: str
    lane: int
    title: str


@dataclass(frozen=True)
class Box:
    """The part of an incarnation in a row; per cent of the row's width."""

    left: float
    width: float
    kind: str
    label: str
    title: str


@dataclass
class Row:
    """A period of time.

    Attributes:
        clock: the time at its start, to the minute or second as the rows need; empty for days.
        idle: text shown in place of everything else where nothing ran.
        lanes: lines that the labels take.
        strips, saves: CSS class and path.
    """

    begin: Moment
    clock: str
    idle: str = ""
    summary: str = ""
    lanes: int = 0
    marks: list[Mark] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    strips: list[tuple[str, str]] = field(default_factory=list)
    saves: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Timeline:
    """All rows.

    Attributes:
        period: seconds of a row.
        ticks: left edge in per cent, and time since the start of a row.
    """

    period: float
    ticks: list[tuple[float, str]]
    rows: list[Row]

    @property
    def drawn(self) -> set[str]:
        """The kinds of all that is drawn, for the legend."""
        return {
            kind
            for row in self.rows
            for kind in (
                *(mark.kind for mark in row.marks),
                *(f"box {box.kind}" for box in row.boxes),
                *(kind for kind, _ in row.strips),
                *(f"save {kind}" for kind, _ in row.saves),
            )
        }


@dataclass(frozen=True)
class _Event:
    at: float
    kind: str
    label: str
    title: str


def timeline(material: Material) -> Timeline | None:
    """Return the timeline; None for a job without events."""
    began, ended = material.began, material.ended
    if material.history.first is None or ended <= began:
        return None
    events = _events(material)
    begin, period = _first_row(began, ended, len(events))
    is_single = begin + period >= ended
    spans, incarnations = material.spans, material.history.incarnations
    rows: list[Row] = []
    count = math.ceil((ended - begin) / period)
    while begin < ended and len(rows) <= 4 * _MAX_ROWS:
        window = _Window(begin, begin + period, count)
        found = moment(begin)
        row = Row(found, _clock(found, period, is_single=is_single))
        row.boxes = window.boxes(incarnations, ended)
        row.marks, row.lanes = window.marks(events)
        row.strips = window.strips(spans)
        row.saves = window.saves(material.history.saves)
        waits = all(kind == Category.WAITING.value for kind, _ in row.strips)
        if waits and not row.boxes and not row.marks:
            _add_idle(rows, row, period)
        else:
            row.summary = window.summary(row, material)
            rows.append(row)
        begin += period
    ticks = [(25.0 * part, offset(period * part / 4)) for part in range(4)]
    return Timeline(period, ticks, rows)


def _clock(begin: Moment, period: float, *, is_single: bool) -> str:
    """Return a row's label; a single row may begin at any second, others at round times."""
    if period >= 86400 and not is_single:
        return ""
    return begin.clock if period < (3600 if is_single else 60) else begin.clock[:5]


def _add_idle(rows: list[Row], row: Row, period: float) -> None:
    """Append an empty row; adjacent ones become one."""
    row.idle = "nothing ran"
    if not rows or not rows[-1].idle:
        rows.append(row)


def _first_row(began: float, ended: float, marks: int) -> tuple[float, float]:
    """Return where the first row begins, and the longest period in which labels have room.

    Rows begin at round times, so that they can be compared. A job that fits a single row has one of
    its own length: at round times, a job of nine seconds around noon would need a row of a day.
    """
    weeks = math.ceil((ended - began) / (7 * 86400))
    wanted = min(_MAX_ROWS, max(math.ceil(marks / _PER_ROW), weeks, 1))
    if wanted == 1:
        return _only_row(began, ended)
    for period in _PERIODS:
        if math.ceil(ended / period) - math.floor(began / period) <= wanted:
            return math.floor(began / period) * period, float(period)
    longest = max((ended - began) / (wanted - 1), float(_PERIODS[-1]))
    return math.floor(began / longest) * longest, longest


def _only_row(began: float, ended: float) -> tuple[float, float]:
    """Return the beginning and the length of a row that a job fills by half at least."""
    for period in _LENGTHS:
        unit = 1 if period < 3600 else 60
        begin = math.floor(began / unit) * unit
        if begin + period >= ended:
            return float(begin), float(period)
    return began, ended - began


def _events(material: Material) -> list[_Event]:
    found = [
        _Event(one.at, "failure", label, _title(label, one.kind or one.cause.value, one.message))
        for label, one, _ in material.failures
    ]
    found += [
        _Event(
            one.at,
            "notice" if one.kind is NoticeKind.NOTICE else "warning",
            f"N{number}",
            _title(f"N{number}", f"{NOTICES[one.kind]} from {one.source}", one.reason),
        )
        for number, one in enumerate(material.history.notices, 1)
    ]
    found += [
        _Event(one.at, "regrouping", "", "all ranks left to start again")
        for one in material.history.interruptions
        if one.cause is Cause.REGROUPING
    ]
    return sorted(found, key=lambda event: event.at)


def _title(label: str, what: str, message: str) -> str:
    shown = message if len(message) <= _TITLE else f"{message[:_TITLE]}..."
    return f"{label}, {what}: {shown}" if shown else f"{label}, {what}"


class _Window:
    """The period of one row.

    Args:
        rows: their number, which share the marks and boxes of a page.
    """

    def __init__(self, begin: float, end: float, rows: int) -> None:
        self._begin = begin
        self._end = end
        self._rows = rows

    def marks(self, events: Sequence[_Event]) -> tuple[list[Mark], int]:
        """Return the marks of the row, and the number of lanes of their labels."""
        edges = [-math.inf] * _LANES
        marks: list[Mark] = []
        seen: set[tuple[str, int]] = set()
        for event in self._inside(events):
            left = self._percent(event.at)
            if (event.kind, int(left * 4)) in seen or len(marks) >= _MAX_MARKS / self._rows:
                continue
            seen.add((event.kind, int(left * 4)))
            half = _CHARACTER_PERCENT * (len(event.label) + 1) / 2
            free = [lane for lane in range(_LANES) if left - half >= edges[lane]]
            lane = free[0] if free and event.label else -1
            if lane >= 0:
                edges[lane] = left + half
            marks.append(Mark(round(left, 2), event.kind, event.label, lane, event.title))
        return marks, max((mark.lane + 1 for mark in marks), default=0)

    def boxes(self, incarnations: Iterable[Incarnation], now: float) -> list[Box]:
        """Return the incarnations in the row; only the longest if there are too many."""
        found: list[Box] = []
        for one in incarnations:
            ended = now if one.ended is None else one.ended
            if ended < self._begin or one.launched >= self._end:
                continue
            left, right = self._percent(one.launched), self._percent(ended)
            label = f"{one.number}" if right - left >= _LABELLED_PERCENT else ""
            how = ENDINGS.get(one.kind, one.kind)
            title = f"incarnation {one.number}, {span(ended - one.launched)}: {how}"
            kind = one.kind if one.kind in ENDINGS else "killed"
            found.append(Box(round(left, 2), round(right - left, 2), kind or "runs", label, title))
        most = _MAX_BOXES // self._rows
        if len(found) > most:
            least = sorted(box.width for box in found)[-most]
            found = [box for box in found if box.width >= least][:most]
        return found

    def strips(self, spans: Sequence[Span]) -> list[tuple[str, str]]:
        """Return the path of each category's rectangles."""
        shares = [dict.fromkeys(Category, 0.0) for _ in range(_WIDTH)]
        width = (self._end - self._begin) / _WIDTH
        first = bisect_right([one.ended for one in spans], self._begin)
        for one in spans[first:]:
            if one.began >= self._end:
                break
            low, high = max(one.began, self._begin), min(one.ended, self._end)
            start = int((low - self._begin) / width)
            for index in range(start, min(int((high - self._begin) / width), _WIDTH - 1) + 1):
                edge = self._begin + index * width
                inside = min(high, edge + width) - max(low, edge)
                shares[index][one.category] += max(0.0, inside)
        return _paths([max(one, key=lambda each: one[each]) if any(one.values()) else None
                       for one in shares])  # fmt: skip

    def saves(self, saves: Sequence[PastSave]) -> list[tuple[str, str]]:
        """Return the path of the ticks of each kind of save."""
        places: dict[str, set[int]] = {}
        first = bisect_left(saves, self._begin, key=lambda save: save.at)
        for save in saves[first:]:
            if save.at >= self._end:
                break
            kind = "failed" if save.error else save.reason
            known = kind if kind in ("failed", "emergency") else "other"
            places.setdefault(known, set()).add(int(self._percent(save.at) * _WIDTH / 200) * 2)
        return [
            (kind, "".join(f"M{place} 0v10" for place in sorted(found)))
            for kind, found in sorted(places.items())
        ]

    def summary(self, row: Row, material: Material) -> str:
        """Return the row in words, for screen readers."""
        labels = [mark.title for mark in row.marks if mark.label]
        first = bisect_left(material.history.saves, self._begin, key=lambda save: save.at)
        last = bisect_left(material.history.saves, self._end, key=lambda save: save.at)
        parts = [plural(len(row.boxes), "incarnation"), plural(last - first, "save"), *labels[:20]]
        return f"from {row.begin.day}, {row.begin.clock}: {'; '.join(parts)}"

    def _inside(self, events: Sequence[_Event]) -> Sequence[_Event]:
        first = bisect_left(events, self._begin, key=lambda event: event.at)
        return events[first : bisect_left(events, self._end, key=lambda event: event.at)]

    def _percent(self, at: float) -> float:
        return 100 * min(1.0, max(0.0, (at - self._begin) / (self._end - self._begin)))


_HEIGHTS: Final = {
    Category.TRAINING: (0, 20), Category.LOST_WORK: (0, 20), Category.STALL: (0, 20),
    Category.RECOVERY: (6, 14), Category.SETUP: (10, 10), Category.WAITING: (17, 3),
}  # fmt: skip
"""Top and height of each, so that its shape tells it apart as well as its colour."""


def _paths(bins: Sequence[Category | None]) -> list[tuple[str, str]]:
    """Return rectangles by category, and the line that hatches those of lost work."""
    paths: dict[Category, list[str]] = {}
    hatched: list[str] = []
    start = 0
    for index in range(1, len(bins) + 1):
        if index < len(bins) and bins[index] is bins[start]:
            continue
        category = bins[start]
        if category is not None:
            top, height = _HEIGHTS[category]
            paths.setdefault(category, []).append(f"M{start} {top}H{index}v{height}H{start}z")
        if category is Category.LOST_WORK:
            hatched.append(f"M{start} 10H{index}")
        start = index
    found = [(category.value, "".join(parts)) for category, parts in paths.items()]
    return [*found, ("hatched", "".join(hatched))] if hatched else found
