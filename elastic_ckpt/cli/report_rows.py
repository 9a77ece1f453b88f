"""A row of each of the report's tables: text, made for people."""

from __future__ import annotations

from dataclasses import dataclass, field

from elastic_ckpt.cli.report.words import Moment


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
    valid: bool
    state: str
    in_full: str


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
