"""How the report writes moments, durations, counts, and the names of things."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Final

from elastic_ckpt.journal.history_types import Cause, Incarnation, NoticeKind
from elastic_ckpt.journal.time_account import Category
from elastic_ckpt.util.units import human_duration

_MESSAGE: Final = 400  # characters


@dataclass(frozen=True)
class Moment:
    """A moment for ``<time>``, in UTC: for machines, and in parts for people."""

    iso: str
    year: str
    day: str
    clock: str


def moment(wall: float) -> Moment:
    """Return the moment of these seconds since the epoch."""
    found = datetime.fromtimestamp(wall, timezone.utc)
    iso = f"{found:%Y-%m-%dT%H:%M:%S}.{found.microsecond // 1000:03d}Z"
    return Moment(iso, f"{found.year}", f"{found.day} {found:%b}", f"{found:%H:%M:%S}")


def local_offset(wall: float) -> str:
    """Return this machine's offset: ``UTC+02:00``."""
    shown = time.strftime("%z", time.localtime(wall))
    return f"UTC{shown[:3]}:{shown[3:]}"


def span(seconds: float | None) -> str:
    """Return a duration in two digits; ``-`` for None."""
    return "0 s" if seconds is not None and seconds <= 0 else human_duration(seconds)


def exact(seconds: float, whole: float) -> str:
    """Return a duration as one that adds up to ``whole``: ``2 d 6 h 54 min``, ``22 min 31 s``."""
    unit = unit_of(whole)
    if seconds <= 0:
        return "-"
    if seconds < unit / 2:
        return human_duration(seconds)
    if unit < 1:
        minutes, rest = divmod(round(seconds, 1), 60)
        return f"{minutes:.0f} min {rest:.1f} s" if minutes else f"{rest:.1f} s"
    left, parts = round(seconds / unit) * round(unit), list[str]()
    for size, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if size < unit:
            break
        number, left = divmod(left, size)
        if number or parts:
            parts.append(f"{number} {name}")
    return " ".join(parts) or human_duration(seconds)


def unit_of(whole: float) -> float:
    """Return the seconds to which the parts of a duration are rounded."""
    return 0.1 if whole < 600 else 1.0 if whole < 36000 else 60.0


def cost(seconds: float) -> str:
    """Return a duration that something cost; ``-`` under a millisecond."""
    return human_duration(seconds) if seconds >= 0.001 else "-"


def plural(count: int, one: str, many: str = "") -> str:
    """Return ``1 failure``, ``2,000 failures``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def share(part: float, whole: float) -> str:
    """Return ``12.3 %``."""
    return f"{100 * part / whole:.1f} %" if whole > 0 else "-"


def step(number: int | None) -> str:
    """Return ``step 7,200``; ``-`` for None."""
    return "-" if number is None else f"step {number:,}"


def origin(one: Incarnation) -> str:
    """Return what an incarnation resumed from: ``step 30, memory``."""
    return f"{step(one.from_step or 0)}, {one.tier}" if one.tier else step(one.from_step or 0)


def cut(text: str) -> str:
    """Return the start of a long message; the journal has all of it."""
    return (text if len(text) <= _MESSAGE else f"{text[:_MESSAGE]}...") or "-"


def figure(value: float) -> str:
    """Return a number of any size, in four digits or as a whole number."""
    if value and not 1e-3 <= abs(value) < 1e12:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def offset(seconds: float) -> str:
    """Return the time since the start of a row: ``30 s``, ``1 min 15``, ``6 h``, ``7 d``."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.4g} d"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    unit = "min"
    if minutes >= 60:
        (minutes, rest), unit = divmod(minutes, 60), "h"
    return f"{minutes} {unit} {rest:02d}" if rest else f"{minutes} {unit}"


def rounded(values: Sequence[float], unit: float) -> list[float]:
    """Return multiples of ``unit`` near the values that add up to their rounded sum."""
    exact = [value / unit for value in values]
    whole = [float(int(value)) for value in exact]
    short = round(sum(exact)) - int(sum(whole))
    order = sorted(range(len(exact)), key=lambda index: whole[index] - exact[index])
    for index in order[: max(0, short)]:
        whole[index] += 1
    return [value * unit for value in whole]


CATEGORIES: Final[Mapping[Category, tuple[str, str]]] = {
    Category.TRAINING: ("training", "steps that still count: the goodput"),
    Category.STALL: ("stall", "training stood still for a save"),
    Category.LOST_WORK: ("lost work", "steps that had to be repeated"),
    Category.RECOVERY: ("recovery", "from a failure or a stop to the next first step"),
    Category.WAITING: ("waiting", "the job was not running, was held, or lacked nodes"),
    Category.SETUP: ("set-up", "before the first step, and after the last one"),
}
"""Name and meaning."""

STAGES: Final[Mapping[str, str]] = {
    "detect": "until the failure was detected",
    "stop": "until the last old process had exited",
    "spawn": "until the new workers ran, including any back-off",
    "import": "imports, from a worker's first line on",
    "rendezvous": "the process group",
    "build": "model, optimizer and data",
    "load": "verifying and loading the checkpoint",
    "first_step": "to the end of the first step",
}
"""Stages of a recovery in order, with their meaning."""

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
    "error": "error in the script",
    "non-finite": "loss not finite",
    "device-memory": "out of GPU memory",
    "host-memory": "killed for lack of host memory",
    "fault": "process fault",
    "signal": "killed by a signal",
    "hang": "hang",
    "storage": "storage failed",
}
"""Classes of failures, in words."""

NOTICES: Final[Mapping[NoticeKind, str]] = {
    NoticeKind.NOTICE: "notice",
    NoticeKind.WARNING: "warning",
    NoticeKind.HELD: "held back",
}

ENDINGS: Final[Mapping[str, str]] = {
    "": "still running",
    "completed": "completed",
    "stopped": "left with a checkpoint",
    "not-begun": "left before its first step",
    "crashed": "crashed",
    "cut-short": "cut short by another node",
    "killed": "ended without a record",
}
"""How an incarnation ended."""

STATES: Final[Mapping[str, str]] = {
    "starting": "starting",
    "running": "training",
    "draining": "saving before the node goes away",
    "backing-off": "failed, restarting soon",
    "finished": "finished",
    "preempted": "preempted, waiting to be restarted",
    "failed": "failed, will not restart by itself",
    "dead": "dead: the supervisor is gone",
    "unknown": "never run under a supervisor",
}
"""State of the whole job."""
