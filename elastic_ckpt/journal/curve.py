"""Curves of what a job reported, and of its speed: from samples, thinned, with what was lost."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from elastic_ckpt.journal.history_types import Incarnation, Sample

BINS: Final = 300
"""Parts of the axis; a line has at most four points in each."""

MAX_LOST_LINES: Final = 200
MAX_CURVES: Final = 8

Point = tuple[float, float]
Line = list[Point]


@dataclass(frozen=True)
class Curve:
    """The values reported under one name, against the step.

    Attributes:
        kept: those that still count.
        lost: those of repeated steps, a line for each repeat.
        last: the newest value that counts.
        count: all values.
    """

    name: str
    kept: Line
    lost: list[Line]
    last: float
    count: int


@dataclass(frozen=True)
class Rate:
    """Samples or steps per second in a stretch of time, saves included."""

    began: float
    ended: float
    value: float


class Steps:
    """All samples of a history, and the one axis on which their steps lie.

    Attributes:
        restarts_count: the script restarts its step count in each epoch.
    """

    def __init__(self, samples: Sequence[Sample], incarnations: Sequence[Incarnation]) -> None:
        self._samples = samples
        self._incarnations = incarnations
        self.restarts_count = any(
            now.incarnation == before.incarnation
            and now.epoch > before.epoch
            and now.step < before.step
            for before, now in pairwise(samples)
        )
        self._offsets = _offsets(samples) if self.restarts_count else {}

    def position(self, epoch: int | None, step: int) -> float:
        """Return a step's position on the axis."""
        return float(step + self._offsets.get(epoch or 0, 0))

    def curves(self) -> list[Curve]:
        """Return the curve of the loss, then the others by name."""
        names = {name for sample in self._samples for name in sample.metrics}
        ordered = sorted(names, key=lambda name: ("loss" not in name, name))[:MAX_CURVES]
        limits = self._limits()
        return [self._curve(name, limits) for name in ordered]

    @property
    def unit(self) -> str:
        """The unit of :meth:`rates`: samples if their number is known, else steps."""
        return "samples" if any(one.samples_per_step for one in self._samples) else "steps"

    def rates(self) -> list[Rate]:
        """Return the rates between consecutive marks of an incarnation, in order of time."""
        in_samples = self.unit == "samples"
        marks = [one for one in self._samples if one.samples_per_step or not in_samples]
        found: list[Rate] = []
        for before, now in pairwise(marks):
            done = self.position(now.epoch, now.step) - self.position(before.epoch, before.step)
            seconds = now.at - before.at
            if now.incarnation != before.incarnation or seconds <= 0 or done <= 0:
                continue
            if found and before.at < found[-1].ended:
                continue  # a clock was set
            each = now.samples_per_step if in_samples else 1
            found.append(Rate(before.at, now.at, done * each / seconds))
        return found

    def _limits(self) -> dict[int | None, float]:
        """Return for each incarnation the step up to which its work still counts."""
        limits: dict[int | None, float] = {}
        limit = math.inf
        for index in range(len(self._incarnations) - 1, -1, -1):
            limits[index] = limit
            one = self._incarnations[index]
            if one.first_step_at is not None and one.from_step is not None:
                limit = min(limit, self.position(one.from_epoch, one.from_step))
        return limits

    def _curve(self, name: str, limits: dict[int | None, float]) -> Curve:
        kept: Line = []
        lost: dict[int | None, Line] = defaultdict(list)
        last = math.nan
        count = 0
        for sample in self._samples:
            value = sample.metrics.get(name)
            if value is None:
                continue
            count += 1
            point = (self.position(sample.epoch, sample.step), value)
            if point[0] <= limits.get(sample.incarnation, math.inf):
                kept.append(point)
                last = value
            else:
                lost[sample.incarnation].append(point)
        kept.sort(key=lambda point: point[0])
        longest = sorted(lost.values(), key=len, reverse=True)[:MAX_LOST_LINES]
        low, high = _ends(point[0] for line in [kept, *longest] for point in line)
        lines = [thin(_connected(line, kept), low, high) for line in longest]
        return Curve(name, thin(kept, low, high), lines, last, count)


def thin(line: Line, low: float, high: float) -> Line:
    """Return a line with at most four points in each of BINS: the ends and the extremes.

    Args:
        low, high: the ends of the axis.
    """
    bins: dict[int, Line] = defaultdict(list)
    width = (high - low) / BINS or 1.0
    for point in line:
        bins[int((point[0] - low) / width)].append(point)
    found: Line = []
    for points in bins.values():
        picks = {0, len(points) - 1, _index(points, min), _index(points, max)}
        found += [points[index] for index in sorted(picks)]
    return found


def averaged(rates: Sequence[Rate], began: float, ended: float) -> list[tuple[float, float, float]]:
    """Return start, end and mean rate of each of BINS stretches of time that have a rate.

    Args:
        began, ended: the ends of the axis.
    """
    width = (ended - began) / BINS
    if width <= 0:
        return []
    amounts, seconds = [0.0] * BINS, [0.0] * BINS
    for rate in rates:
        first = min(max(int((rate.began - began) / width), 0), BINS - 1)
        last = min(max(int((rate.ended - began) / width), 0), BINS - 1)
        for index in range(first, last + 1):
            low, high = began + index * width, began + (index + 1) * width
            inside = min(rate.ended, high) - max(rate.began, low)
            if inside > 0:
                amounts[index] += rate.value * inside
                seconds[index] += inside
    return [
        (began + index * width, began + (index + 1) * width, amounts[index] / seconds[index])
        for index in range(BINS)
        if seconds[index] > 0
    ]


def _offsets(samples: Iterable[Sample]) -> dict[int, int]:
    """Return for each epoch the steps before it, if each epoch counts from its own first step."""
    longest: dict[int, int] = defaultdict(int)
    for sample in samples:
        longest[sample.epoch] = max(longest[sample.epoch], sample.step)
    offsets, before = {}, 0
    for epoch in sorted(longest):
        offsets[epoch] = before
        before += longest[epoch]
    return offsets


def _connected(line: Line, kept: Line) -> Line:
    """Return a lost line that starts at the kept point before it, so that no gap is drawn."""
    index = bisect_left(kept, line[0][0], key=lambda point: point[0])
    return [kept[index - 1], *line] if index else line


def _ends(values: Iterable[float]) -> Point:
    found = list(values)
    return (min(found), max(found)) if found else (0.0, 0.0)


def _index(points: Line, of: Callable[[Iterable[float]], float]) -> int:
    values = [point[1] for point in points]
    return values.index(of(values))
