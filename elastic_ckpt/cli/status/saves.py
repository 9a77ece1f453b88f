"""What ``status`` shows of saves: the newest one, the last emergency, how often they are made."""

from __future__ import annotations

import msgspec

from elastic_ckpt.jobdir.node_record import NodeRecord
from elastic_ckpt.journal.events import Drained, DrainFailed, EmergencySaved, Saved, SaveFailed
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.util.text import printable


class LastSaveView(msgspec.Struct):
    """The newest save: seconds. ``error`` says why it failed, and is empty if it did not."""

    reason: str
    predicted_seconds: float | None
    actual_seconds: float
    stall_seconds: float
    error: str = ""


class EmergencySaveView(msgspec.Struct):
    """The last save on a notice: seconds from the notice until it was on the disk.

    ``predicted_seconds`` is None where nothing was known.
    """

    predicted_seconds: float | None
    actual_seconds: float


class SaveIntervalView(msgspec.Struct):
    """What ``--save-interval auto`` came to: seconds between saves, and why."""

    seconds: float
    why: str


def last_save(entries: list[JournalEntry]) -> LastSaveView | None:
    """The newest save of a journal."""
    emergency: EmergencySaved | None = None
    drain: Drained | DrainFailed | None = None
    for entry in reversed(entries):
        match entry.event:
            case EmergencySaved() as emergency:  # written after the save that it is about
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
    """Empty if the newest drain came to its end, or there was none."""
    if not isinstance(drain, DrainFailed):
        return ""
    return f"in memory, and not on the disk: {printable(drain.error)}"


def last_emergency_save(entries: list[JournalEntry]) -> EmergencySaveView | None:
    """The newest emergency save of a journal."""
    for entry in reversed(entries):
        if isinstance(entry.event, EmergencySaved):
            return EmergencySaveView(entry.event.predicted_seconds, entry.event.actual_seconds)
    return None


def save_interval(record: NodeRecord | None) -> SaveIntervalView | None:
    """The automatic interval of the latest run."""
    if record is None or record.save_interval is None:
        return None
    return SaveIntervalView(record.save_interval.seconds, record.save_interval.why)
