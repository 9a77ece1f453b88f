"""What the order of samples costs: the first index, each further one, and memory.

``ElasticSampler`` at 10^9 samples, beside a list of ``torch.randperm`` and torch's
``DistributedSampler`` at a size that fits into memory (at which ElasticSampler is measured, too).
Each in a process of its own, in turn, after a first use of a small data set. ``ns an index`` is the
processor time of one core, after the first index and with what comes before it. Goals: the first
index within 1 ms, at least 5 million indices a second (200 ns each), less than 5 MB more of
resident memory. Ratios are to ``torch.randperm``.
"""

from __future__ import annotations

import multiprocessing
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from harness import Options, Report, goal, progress, ratios, read_options, summary
from torch.utils.data import DistributedSampler

from elastic_ckpt import ElasticSampler

LARGE = 10**9
FITS = 5_000_000
QUICK_FITS = 10**5
WARM = 5000
KINDS = ("ns an index", "with the start", "MB grown")

Figures = tuple[float, float, float, float]
"""Seconds to the first index, nanoseconds of each further one, of each with what came before the
first, megabytes grown."""


class Sized:
    """A data set of any length."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def ours(size: int) -> Iterator[int]:
    """The only rank's indices."""
    return iter(ElasticSampler(Sized(size), 1, 0, seed=0))


def torchs(size: int) -> Iterator[int]:
    """Those of torch's sampler for the same rank."""
    return iter(DistributedSampler(Sized(size), 1, 0, seed=0))  # type: ignore[arg-type]


def randperm(size: int) -> Iterator[int]:
    """A permutation, as a list of numbers."""
    return iter(torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist())


CONTESTANTS: dict[str, tuple[Callable[[int], Iterator[int]], bool]] = {
    "torch.randperm": (randperm, False),
    "DistributedSampler": (torchs, False),
    "ElasticSampler": (ours, False),
    "ElasticSampler, 10^9": (ours, True),
}


def measure(name: str, count: int) -> Figures:
    """One contestant's figures over so many indices, in a new process."""
    make, large = CONTESTANTS[name]
    for _ in range(3):
        deque(make(WARM), maxlen=0)
    before = _resident("VmRSS")
    start, began = time.process_time(), time.perf_counter()
    indices = make(LARGE if large else count)
    next(indices)
    first = time.perf_counter() - began
    steady = time.process_time()
    deque(islice(indices, count - 1), maxlen=0)
    end = time.process_time()
    grown = max(0.0, _resident("VmHWM") - before)
    return first, 1e9 * (end - steady) / count, 1e9 * (end - start) / count, grown


def _resident(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def _compared(mine: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> str:
    """The medians of the ratios of one pass."""
    found = []
    for kind, a, b in zip(("first index", *KINDS), mine, other, strict=True):
        if all(b):
            found.append(f"{kind} {statistics.median(ratios(a, b)):.2g}")
    return ", ".join(found)


def passes(options: Options) -> dict[str, list[Figures]]:
    """The figures of each contestant, one per pass; a pass before them is dropped."""
    count = QUICK_FITS if options.quick else FITS
    found: dict[str, list[Figures]] = {name: [] for name in CONTESTANTS}
    context = multiprocessing.get_context("spawn")
    for turn in range(options.repeats + 1):
        progress(f"pass {turn} of {options.repeats}")
        for name, figures in found.items():
            with context.Pool(1) as pool:
                figures.append(pool.apply(measure, (name, count)))
    return {name: figures[1:] for name, figures in found.items()}


def main() -> None:
    """Print the table."""
    options = read_options(__doc__)
    found = passes(options)
    title = f"The order of {QUICK_FITS if options.quick else FITS:,} samples"
    report = Report("sampler", title, {"samples": LARGE})
    columns = {name: list(zip(*figures, strict=True)) for name, figures in found.items()}
    floor = columns["torch.randperm"]
    for name, (first, *more) in columns.items():
        report.rows.append(summary(name, first, floor[0], more=dict(zip(KINDS, more, strict=True))))
        for other in ("torch.randperm", "DistributedSampler"):
            if name.startswith("ElasticSampler"):
                report.notes.append(f"{name} / {other}: {_compared(columns[name], columns[other])}")
    first, each, _, grown = columns["ElasticSampler, 10^9"]
    report.goals.append(goal("first index at 10^9", [1000 * one for one in first], 1.0, " ms"))
    report.goals.append(goal("an index at 10^9", each, 200.0, " ns"))
    report.goals.append(goal("resident memory grown at 10^9", grown, 5.0, " MB"))
    report.show(options)


if __name__ == "__main__":
    main()
