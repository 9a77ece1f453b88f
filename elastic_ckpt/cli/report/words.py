"""How the report writes moments, durations, counts, and the names of things."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Final

from elastic_ckpt.journal.history_types import Cause, NoticeKind
from elastic_ckpt.journal.time_account import Category
from elastic_ckpt.util.units import human_duration


@dataclass(frozen=True)
class Moment:
    """A moment for ``<time>``: as machines read it, and as people do; all UTC."""

    iso: str
    year: str
    day: str
    clock: str


def moment(wall: float) -> Moment:
    """Of seconds since the epoch."""
    found = datetime.fromtimestamp(wall, timezone.utc)
    iso = f"{found:%Y-%m-%dT%H:%M:%S}.{found.microsecond // 1000:03d}Z"
    return Moment(iso, f"{found.year}", f"{found.day} {found:%b}", f"{found:%H:%M:%S}")


def local_offset(wall: float) -> str:
    """``UTC+02:00``: of this machine."""
    shown = time.strftime("%z", time.localtime(wall))
    return f"UTC{shown[:3]}:{shown[3:]}"


def span(seconds: float) -> str:
    """A duration in two digits."""
    return human_duration(seconds) if seconds > 0 else "0 s"


def plural(count: int, one: str, many: str = "") -> str:
    """``1 failure``, ``2,000 failures``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def share(part: float, whole: float) -> str:
    """``12.3 %``."""
    return f"{100 * part / whole:.1f} %" if whole > 0 else "-"


def listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def figure(value: float) -> str:
    """A number of any size, in four digits or whole."""
    if value and not 1e-3 <= abs(value) < 1e12:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def offset(seconds: float) -> str:
    """Time since a row's begin: ``0:30`` in minutes, ``6:00`` in hours, ``7 d``."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.4g} d"
    hours, rest = divmod(round(seconds), 3600)
    if hours:
        return f"{hours} h {rest // 60:02d}" if rest else f"{hours} h"
    minutes, rest = divmod(rest, 60)
    return (
        f"{minutes} min {rest:02d}"
        if rest and minutes
        else (f"{minutes} min" if minutes else f"{seconds:.3g} s")
    )


def rounded(values: Sequence[float], unit: float) -> list[float]:
    """Multiples of ``unit`` near the values that add up to their sum, itself rounded."""
    exact = [value / unit for value in values]
    whole = [float(int(value)) for value in exact]
    short = round(sum(exact)) - int(sum(whole))
    order = sorted(range(len(exact)), key=lambda index: whole[index] - exact[index])
    for index in order[: max(0, short)]:
        whole[index] += 1
    return [value * unit for value in whole]


def tally(words: Iterable[str]) -> list[tuple[str, int]]:
    """How often each occurs, the most frequent first."""
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


CATEGORIES: Final[Mapping[Category, tuple[str, str]]] = {
    Category.TRAINING: ("training", "steps that still count: the goodput"),
    Category.STALL: ("stall", "training stood still for a save"),
    Category.LOST_WORK: ("lost work", "steps that had to be done again"),
    Category.RECOVERY: ("recovery", "from a failure or a stop to the next first step"),
    Category.WAITING: ("waiting", "nobody ran the job, or it was held, or nodes were missing"),
    Category.SETUP: ("set-up", "until the very first step, and behind the last one"),
}
"""Name, and what it is."""

STAGES: Final[Mapping[str, str]] = {
    "detect": "until the failure was known",
    "stop": "until the last old process was gone",
    "spawn": "until the new workers ran, a back-off included",
    "import": "imports, from a worker's first line on",
    "rendezvous": "the process group",
    "build": "model, optimizer and data",
    "load": "verifying and loading the checkpoint",
    "first_step": "to the end of the first step",
}
"""Of a recovery, in order, and what each is."""

CAUSES: Final[Mapping[Cause, str]] = {
    Cause.FAILURE: "failure",
    Cause.KILLED: "run killed",
    Cause.GAVE_UP: "gave up",
    Cause.PREEMPTION: "preemption",
    Cause.REGROUPING: "regrouping",
}

CLASSES: Final[Mapping[str, str]] = {
    "membership": "node vanished",
    "start-up": "did not start up",
    "error": "error of the script",
    "non-finite": "loss that is no number",
    "device-memory": "out of GPU memory",
    "host-memory": "killed for host memory",
    "fault": "fault of a process",
    "signal": "killed by a signal",
    "hang": "hang",
    "storage": "storage refused",
}
"""Of failures, in words."""

NOTICES: Final[Mapping[NoticeKind, str]] = {
    NoticeKind.NOTICE: "notice",
    NoticeKind.WARNING: "warning",
    NoticeKind.HELD: "held back",
}

ENDINGS: Final[Mapping[str, str]] = {
    "": "still runs",
    "completed": "completed",
    "stopped": "left with a checkpoint",
    "not-begun": "left before its first step",
    "crashed": "crashed",
    "cut-short": "cut short by another node",
    "killed": "ended without a word",
}
"""How an incarnation ended."""

STATES: Final[Mapping[str, str]] = {
    "starting": "starting",
    "running": "training",
    "draining": "saving, because the node goes away",
    "backing-off": "failed, and about to start again",
    "finished": "finished",
    "preempted": "preempted, and waiting to be run again",
    "failed": "failed, and will not restart by itself",
    "dead": "dead: its supervisor is gone",
    "unknown": "never run under a supervisor",
}
"""Of the whole job."""
