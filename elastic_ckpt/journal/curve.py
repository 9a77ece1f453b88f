"""Curves of what a job reported and how fast it was, from samples: thinned, with what was lost."""

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
"""A line has so many places, and at most four points in each."""

MAX_LOST_LINES: Final = 200
MAX_CURVES: Final = 8

Point = tuple[float, float]
Line = list[Point]


@dataclass(frozen=True)
class Curve:
    """What was reported under one name, against the step.

    Attributes:
        kept: what still counts.
        lost: what was done again, one line for each time.
        last: the newest value that counts.
        count: values in all.
    """

    name: str
    kept: Line
    lost: list[Line]
    last: float
    count: int


@dataclass(frozen=True)
class Rate:
    """Samples or steps per second from a moment to another, saves included."""

    began: float
    ended: float
    value: float


class Steps:
    """All samples of a history, and the one axis on which their steps lie.

    Attributes:
        counts_anew: the script begins to count its steps anew in each epoch.
    """

    def __init__(self, samples: Sequence[Sample], incarnations: Sequence[Incarnation]) -> None:
        self._samples = samples
        self._incarnations = incarnations
        self.counts_anew = any(
            now.incarnation == before.incarnation
            and now.epoch > before.epoch
            and now.step < before.step
            for before, now in pairwise(samples)
        )
        self._offsets = _offsets(samples) if self.counts_anew else {}

    def place(self, epoch: int | None, step: int) -> float:
        """Where a step lies on the axis."""
        return float(step + self._offsets.get(epoch or 0, 0))

    def curves(self) -> list[Curve]:
        """The loss first, then the others by name."""
        names = {name for sample in self._samples for name in sample.metrics}
        ordered = sorted(names, key=lambda name: ("loss" not in name, name))[:MAX_CURVES]
        limits = self._limits()
        return [self._curve(name, limits) for name in ordered]

    @property
    def unit(self) -> str:
        """Of :meth:`rates`: samples where their number is known."""
        return "samples" if any(one.samples_per_step for one in self._samples) else "steps"

    def rates(self) -> list[Rate]:
        """Between each two marks of an incarnation, in order of time."""
        in_samples = self.unit == "samples"
        marks = [one for one in self._samples if one.samples_per_step or not in_samples]
        found: list[Rate] = []
        for before, now in pairwise(marks):
            done = self.place(now.epoch, now.step) - self.place(before.epoch, before.step)
            seconds = now.at - before.at
            if now.incarnation != before.incarnation or seconds <= 0 or done <= 0:
                continue
            if found and before.at < found[-1].ended:
                continue  # somebody set a clock
            each = now.samples_per_step if in_samples else 1
            found.append(Rate(before.at, now.at, done * each / seconds))
        return found

    # -- inside -------------------------------------------------------------------------------

    def _limits(self) -> dict[int | None, float]:
        """For each incarnation the step up to which what it did still counts."""
        limits: dict[int | None, float] = {}
        limit = math.inf
        for index in range(len(self._incarnations) - 1, -1, -1):
            limits[index] = limit
            one = self._incarnations[index]
            if one.first_step_at is not None and one.from_step is not None:
                limit = min(limit, self.place(one.from_epoch, one.from_step))
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
            point = (self.place(sample.epoch, sample.step), value)
            if point[0] <= limits.get(sample.incarnation, math.inf):
                kept.append(point)
                last = value
            else:
                lost[sample.incarnation].append(point)
        kept.sort(key=lambda point: point[0])
        longest = sorted(lost.values(), key=len, reverse=True)[:MAX_LOST_LINES]
        low, high = _ends(point[0] for line in [kept, *longest] for point in line)
        lines = [thin(_hung_on(line, kept), low, high) for line in longest]
        return Curve(name, thin(kept, low, high), lines, last, count)


def thin(line: Line, low: float, high: float) -> Line:
    """The same line with no more than four points in each of BINS: the ends and the extremes.

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
    """Begin, end and mean rate of each of BINS stretches in which there was one.

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
    """For each epoch the steps of those before it, where each epoch counts from its own first."""
    longest: dict[int, int] = defaultdict(int)
    for sample in samples:
        longest[sample.epoch] = max(longest[sample.epoch], sample.step)
    offsets, before = {}, 0
    for epoch in sorted(longest):
        offsets[epoch] = before
        before += longest[epoch]
    return offsets


def _hung_on(line: Line, kept: Line) -> Line:
    """A lost line with the point of the kept one that it left from, so that no gap is drawn."""
    index = bisect_left(kept, line[0][0], key=lambda point: point[0])
    return [kept[index - 1], *line] if index else line


def _ends(values: Iterable[float]) -> Point:
    found = list(values)
    return (min(found), max(found)) if found else (0.0, 0.0)


def _index(points: Line, of: Callable[[Iterable[float]], float]) -> int:
    values = [point[1] for point in points]
    return values.index(of(values))
