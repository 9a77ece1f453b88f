"""Saves in ``status``: the newest, the last emergency save, and the interval."""

from __future__ import annotations

import msgspec

from elastic_ckpt.jobdir.node_record import NodeRecord
from elastic_ckpt.journal.events import Drained, DrainFailed, EmergencySaved, Saved, SaveFailed
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.util.text import printable


class LastSaveView(msgspec.Struct):
    """The newest save, in seconds; ``error`` is empty unless it failed."""

    reason: str
    predicted_seconds: float | None
    actual_seconds: float
    stall_seconds: float
    error: str = ""


class EmergencySaveView(msgspec.Struct):
    """The last save on a notice: seconds from the notice until it was on the disk.

    ``predicted_seconds`` is None without earlier measurements.
    """

    predicted_seconds: float | None
    actual_seconds: float


class SaveIntervalView(msgspec.Struct):
    """The interval that ``--save-interval auto`` chose: seconds between saves, and why."""

    seconds: float
    why: str


def last_save(entries: list[JournalEntry]) -> LastSaveView | None:
    """Return the newest save in the journal."""
    emergency: EmergencySaved | None = None
    drain: Drained | DrainFailed | None = None
    for entry in reversed(entries):
        match entry.event:
            case EmergencySaved() as emergency:  # written after the save that it describes
                pass
            case Drained() | DrainFailed() as event:
                drain = drain or event
            case Saved(seconds=seconds, stall_seconds=stall) as event:
                predicted = emergency.predicted_seconds if emergency else None
                reason, why = printable(event.reason), _why_not_drained(drain)
                return LastSaveView(reason, predicted, seconds, stall or 0.0, why)
            case SaveFailed(stall_seconds=stall) as event:
                predicted = emergency.predicted_seconds if emergency else None
                reason, why = printable(event.reason), printable(event.error)
                return LastSaveView(reason, predicted, 0.0, stall, why or _why_not_drained(drain))
    return None


def _why_not_drained(drain: Drained | DrainFailed | None) -> str:
    """Return the error of the newest drain; empty if it succeeded, or there was none."""
    if not isinstance(drain, DrainFailed):
        return ""
    return f"in memory but not on the disk: {printable(drain.error)}"


def last_emergency_save(entries: list[JournalEntry]) -> EmergencySaveView | None:
    """Return the newest emergency save in the journal."""
    for entry in reversed(entries):
        if isinstance(entry.event, EmergencySaved):
            return EmergencySaveView(entry.event.predicted_seconds, entry.event.actual_seconds)
    return None


def save_interval(record: NodeRecord | None) -> SaveIntervalView | None:
    """Return the automatic interval of the latest run."""
    if record is None or record.save_interval is None:
        return None
    return SaveIntervalView(record.save_interval.seconds, record.save_interval.why)
