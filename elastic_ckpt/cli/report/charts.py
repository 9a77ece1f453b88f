"""The report's drawings: curves against the step, rates against time, bars of recoveries."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from elastic_ckpt.cli.report.material import Material
from elastic_ckpt.cli.report.words import STAGES, figure, moment, plural
from elastic_ckpt.journal.curve import Curve, averaged
from elastic_ckpt.journal.history_types import Recovery

WIDTH: Final = 1000
HEIGHT: Final = 300
"""Height of a drawing; the page stretches it."""

_TICKS: Final = 5
_MAX_BARS: Final = 24
_CUT_AT: Final = 6.0  # times the median from which a bar is cut


@dataclass(frozen=True)
class Chart:
    """A drawing with its axes.

    Attributes:
        summary: the drawing in words, for screen readers.
        rows: per cent from the bottom, and label.
        columns: per cent from the left, and label.
        axis: what the columns are.
        lines: CSS class and path of each.
    """

    title: str
    summary: str
    rows: list[tuple[float, str]]
    columns: list[tuple[float, str]]
    axis: str
    lines: list[tuple[str, str]]


@dataclass(frozen=True)
class Bar:
    """One recovery.

    Attributes:
        parts: number, left and width in per cent of each stage that took time.
        is_cut: the bar is too long to be drawn to its end.
    """

    label: str
    recovery: Recovery
    parts: list[tuple[int, float, float]]
    is_cut: bool


@dataclass(frozen=True)
class Recoveries:
    """The bars of the newest recoveries, and the stages of all; seconds.

    Attributes:
        stages: number, name, meaning, median and longest of each that took time.
    """

    count: int
    median: float
    longest: float
    bars: list[Bar]
    stages: list[tuple[int, str, str, float, float]]


def metric_charts(material: Material) -> list[Chart]:
    """Return a chart for each name that the script reported."""
    return [_metric(curve) for curve in material.steps.curves() if curve.kept]


def _metric(curve: Curve) -> Chart:
    points = [point for line in (curve.kept, *curve.lost) for point in line]
    across = _Scale([point[0] for point in points], whole=True)
    up = _Scale([point[1] for point in points])
    lines = [("again", _band(line, across)) for line in curve.lost]
    lines += [
        (f"curve {kind}{' dot' if len(line) == 1 else ''}", _path(line, across, up))
        for kind, found in (("kept", [curve.kept]), ("lost", curve.lost))
        for line in found
    ]
    values = [point[1] for point in curve.kept]
    summary = (
        f"{curve.name} against the step, {curve.count:,} values: from {figure(values[0])} to "
        f"{figure(curve.last)}, lowest {figure(min(values))}, highest {figure(max(values))}"
    )
    if curve.lost:
        summary += f"; {plural(len(curve.lost), 'part')} lost and repeated"
    return Chart(curve.name, summary, up.ticks(), across.ticks(), "step", lines)


def rate_chart(material: Material) -> Chart | None:
    """Return samples or steps per second against time; None without step marks."""
    rates = material.steps.rates()
    bins = averaged(rates, material.began, material.ended)
    if not bins:
        return None
    unit = material.steps.unit
    up = _Scale([0.0, *(value for _, _, value in bins)])
    path, before = [], -math.inf
    length = material.ended - material.began
    for began, ended, value in bins:
        left, right = (WIDTH * (at - material.began) / length for at in (began, ended))
        high = HEIGHT - HEIGHT * up.share(value)
        joined = began - before < 1e-6 * length
        path.append(f"{'V' if joined else f'M{left:.1f} '}{high:.1f}H{right:.1f}")
        before = ended
    done = sum(rate.value * (rate.ended - rate.began) for rate in rates)
    mean = done / sum(rate.ended - rate.began for rate in rates)
    summary = f"{unit} per second against time: {figure(mean)} on average while it trained"
    return Chart(
        f"{unit} per second", summary, up.ticks(), _clock_ticks(material.began, material.ended),
        "UTC", [("curve kept", "".join(path))],
    )  # fmt: skip


def recoveries(material: Material) -> Recoveries | None:
    """Return the recoveries; None if there were none."""
    found = material.history.recoveries
    if not found:
        return None
    moments = [one.at for _, one, _ in material.failures]
    labels = [label for label, _, _ in material.failures]
    totals = [one.total for one in found]
    median = statistics.median(totals)
    scale = min(max(totals), _CUT_AT * median) or 1.0
    shown = found[-_MAX_BARS:]
    bars = []
    for one in shown:
        index = bisect_left(moments, one.at)
        bars.append(_bar(one, labels[index - 1] if index else "", scale))
    stages = [
        (
            number, name.replace("_", " "), what,
            statistics.median(one.stages.get(name, 0.0) for one in found),
            max(one.stages.get(name, 0.0) for one in found),
        )
        for number, (name, what) in enumerate(STAGES.items(), 1)
        if any(one.stages.get(name, 0.0) > 0 for one in found)
    ]  # fmt: skip
    return Recoveries(len(found), median, max(totals), bars, stages)


def _bar(one: Recovery, label: str, scale: float) -> Bar:
    parts, left = [], 0.0
    for number, name in enumerate(STAGES, 1):
        width = 100 * one.stages.get(name, 0.0) / scale
        width = min(width, 100.0 - left)
        if width > 0:
            parts.append((number, round(left, 2), round(width, 2)))
            left += width
    return Bar(label or moment(one.at).clock, one, parts, one.total > scale * 1.001)


class _Scale:
    """An axis that ends at round numbers around all values."""

    def __init__(self, values: Iterable[float], *, whole: bool = False) -> None:
        found = list(values)
        low, high = min(found), max(found)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            reach = abs(high) * 0.1 or 1.0
            low, high = low - reach, high + reach
        self._step = _round_up((high - low) / _TICKS, whole=whole)
        self._low = math.floor(low / self._step) * self._step
        self._high = math.ceil(high / self._step) * self._step
        if whole:
            self._low, self._high = low, high

    def share(self, value: float) -> float:
        """Return where a value lies, from 0 to 1."""
        return (value - self._low) / (self._high - self._low)

    def ticks(self) -> list[tuple[float, str]]:
        """Return per cent of the axis, and label, of each tick."""
        first = math.ceil(self._low / self._step - 1e-9)
        last = math.floor(self._high / self._step + 1e-9)
        values = [index * self._step for index in range(first, last + 1)]
        return [(round(100 * self.share(value), 2), figure(value)) for value in values]


def _round_up(value: float, *, whole: bool) -> float:
    """Return the next of 1, 2, 5, 10, 20 ..."""
    size = 10.0 ** math.floor(math.log10(value))
    found = next(size * digit for digit in (1, 2, 5, 10) if size * digit >= value * 0.999)
    return max(1.0, found) if whole else found


def _path(line: Sequence[tuple[float, float]], across: _Scale, up: _Scale) -> str:
    """Return a polyline; a single point is a dot, as the line's ends are round."""
    places = [(WIDTH * across.share(x), HEIGHT * (1 - up.share(y))) for x, y in line]
    body = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f"M{body}" + ("h0" if len(places) == 1 else "")


def _band(line: Sequence[tuple[float, float]], across: _Scale) -> str:
    """Return a band from bottom to top over the steps of a line."""
    left, right = (WIDTH * across.share(line[index][0]) for index in (0, -1))
    return f"M{left:.1f} 0H{max(right, left + 1):.1f}V{HEIGHT}H{left:.1f}z"


def _clock_ticks(began: float, ended: float) -> list[tuple[float, str]]:
    """Return ticks at round times of the day, or at days."""
    length = ended - began
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200)
    step = float(next((one for one in steps if length / one <= _TICKS), 0))
    if not step:
        step = 86400.0 * math.ceil(length / _TICKS / 86400)
    first, last = math.ceil(began / step), math.floor(ended / step)
    found = []
    for index in range(first, last + 1):
        shown = moment(index * step)
        label = shown.day if step >= 86400 else shown.clock if step < 60 else shown.clock[:5]
        found.append((round(100 * (index * step - began) / length, 2), label))
    return found
