"""What the benchmarks share: options, places that are cleaned up, medians, tables, JSON.

Everything is a ratio from one run, in which the contestants take turns, because disks and
neighbours change from minute to minute. The first passes warm up and are dropped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

MEMORY = Path("/dev/shm")
QUICK_MEGABYTES = 24.0
QUICK_REPEATS = 2


@dataclass(frozen=True)
class Options:
    """What every benchmark is told.

    Attributes:
        megabytes: of fp32 model and optimizer state in all; 10**6 bytes each.
        repeats: passes that count.
        quick: a smoke test: small, few, and of no meaning as a measurement.
        directory: on the disk that is to be measured.
        json: where the figures go.
    """

    megabytes: float
    repeats: int
    quick: bool
    directory: str
    json: str | None


def read_options(doc: str, megabytes: float = 1500.0, repeats: int = 5) -> Options:
    """Options of the command line; the first line of ``doc`` says what is measured."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--size", type=float, default=None, metavar="MB", help="of state in all")
    parser.add_argument("--repeats", type=int, default=None, help="passes that count")
    parser.add_argument("--quick", action="store_true", help="a smoke test of no meaning")
    parser.add_argument("--directory", default=".", help="on the disk that is to be measured")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    found = parser.parse_args()
    usual = (QUICK_MEGABYTES, QUICK_REPEATS) if found.quick else (megabytes, repeats)
    return Options(
        megabytes=found.size or usual[0],
        repeats=found.repeats or usual[1],
        quick=found.quick,
        directory=found.directory,
        json=found.json,
    )


@dataclass(frozen=True)
class Places:
    """Where a benchmark may write: one directory on the disk, and one in memory."""

    disk: Path
    memory: Path

    def inside(self, name: str) -> Places:
        """New directories below these."""
        inner = Places(self.disk / name, self.memory / name)
        inner.disk.mkdir()
        inner.memory.mkdir()
        return inner


@contextlib.contextmanager
def places(directory: str) -> Iterator[Places]:
    """New directories, gone afterwards, whether the benchmark ends, fails or is interrupted."""
    previous = signal.signal(signal.SIGTERM, _leave)
    disk = Path(tempfile.mkdtemp(dir=directory, prefix=".benchmark-")).resolve()
    memory = Path(tempfile.mkdtemp(dir=MEMORY, prefix=f"elastic-ckpt-benchmark-{os.getpid()}-"))
    try:
        yield Places(disk, memory)
    finally:
        shutil.rmtree(disk, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)
        signal.signal(signal.SIGTERM, previous)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@dataclass(frozen=True)
class Row:
    """One contestant's figure.

    Attributes:
        name: the contestant.
        unit: of ``median``, ``low`` and ``high``.
        ratio: the median over the passes of this one to the floor in the same pass.
        note: one line, such as why there are no figures.
        more: further medians by what they are.
    """

    name: str
    unit: str = "s"
    median: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    note: str = ""
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Goal:
    """A figure beside what it should be.

    Attributes:
        what: what is measured, and against what.
        figure: the median; ``low`` and ``high`` are over the passes.
        limit: the most that meets it.
    """

    what: str
    figure: float
    low: float
    high: float
    limit: float
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the median is within the limit."""
        return self.figure <= self.limit


@dataclass
class Report:
    """What one benchmark found.

    Attributes:
        benchmark: its name, which is its file's.
        title: what the table shows.
        settings: what somebody needs to run it again.
    """

    benchmark: str
    title: str
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def show(self, options: Options) -> None:
        """Print a table, and write JSON where that was asked for."""
        console = Console(width=max(120, Console().width))
        table = Table(title=self.title, title_justify="left")
        kinds = list(dict.fromkeys(kind for row in self.rows for kind in row.more))
        for column in ("", "median", "lowest", "highest", "x floor", *kinds):
            table.add_column(column, justify="left" if column == "" else "right")
        table.add_column("note", overflow="fold")
        for row in self.rows:
            figures = (row.median, row.low, row.high)
            cells = [_figure(value, row.unit) for value in figures]
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            extra = [_figure(row.more.get(kind), "") for kind in kinds]
            table.add_row(row.name, *cells, ratio, *extra, row.note)
        console.print(table)
        for goal in self.goals:
            spread = f"{goal.low:.3g} to {goal.high:.3g}"
            verdict = "met" if goal.met else "MISSED"
            line = f"{goal.what}: {goal.figure:.3g}{goal.unit} ({spread}), "
            console.print(f"{line}goal {goal.limit:g}{goal.unit}: {verdict}", highlight=False)
        for note in self.notes:
            console.print(note, highlight=False, markup=False)
        if options.quick:
            console.print("quick: these figures mean nothing", highlight=False)
        if options.json:
            Path(options.json).write_text(json.dumps(self._plain(options), indent=1) + "\n")

    def _plain(self, options: Options) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "title": self.title,
            "machine": machine(),
            "settings": {"quick": options.quick, "repeats": options.repeats, **self.settings},
            "rows": [asdict(row) for row in self.rows],
            "goals": [{**asdict(goal), "met": goal.met} for goal in self.goals],
            "notes": self.notes,
        }


def summary(
    name: str,
    values: Sequence[float],
    floor: Sequence[float] | None = None,
    note: str = "",
    more: Mapping[str, Sequence[float]] | None = None,
    unit: str = "s",
) -> Row:
    """A row from one value per pass; the ratio is taken pass by pass."""
    return Row(
        name=name,
        unit=unit,
        median=statistics.median(values),
        low=min(values),
        high=max(values),
        ratio=statistics.median(ratios(values, floor)) if floor else None,
        note=note,
        more={kind: statistics.median(found) for kind, found in (more or {}).items()},
    )


def ratios(values: Sequence[float], floor: Sequence[float]) -> list[float]:
    """Each pass's own."""
    return [value / base for value, base in zip(values, floor, strict=True)]


def goal(what: str, values: Sequence[float], limit: float, unit: str = "") -> Goal:
    """A goal from one figure per pass."""
    return Goal(what, statistics.median(values), min(values), max(values), limit, unit)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for package in ("torch", "colossalai", "dlrover", "nvidia-resiliency-ext", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
    }


def progress(line: str) -> None:
    """One line for whoever waits."""
    print(f"  {line}", file=sys.stderr, flush=True)


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    text = f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}" if abs(value) < 10 else (
        f"{value:.1f}"
    )  # fmt: skip
    return f"{text} {unit}".rstrip()
