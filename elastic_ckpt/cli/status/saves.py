"""What ``status`` shows of saves: the newest one, the last emergency, how often they are made."""

from __future__ import annotations

from typing import Any

import msgspec

from elastic_ckpt.jobdir.node_record import NodeRecord
from elastic_ckpt.journal.journal import JournalEvent
from elastic_ckpt.journal.time_account import number
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


def last_save(events: list[JournalEvent]) -> LastSaveView | None:
    """The newest save of a journal."""
    emergency = drain = None
    for event in reversed(events):
        if event.event == "emergency_save":
            emergency = event  # journaled behind the save that it tells of
        if event.event in ("drained", "drain_failed") and drain is None:
            drain = event
        if event.event in ("saved", "save_failed"):
            data: dict[str, Any] = event.data
            told = data if emergency is None else emergency.data
            return LastSaveView(
                _text(data.get("reason")),
                number(told.get("predicted_seconds"), None),
                number(data.get("seconds"), 0.0),
                number(data.get("stall_seconds"), 0.0),
                _text(data.get("error")) or _why_not_drained(drain),
            )
    return None


def _why_not_drained(drain: JournalEvent | None) -> str:
    """Empty if the newest drain came to its end, or there was none."""
    if drain is None or drain.event == "drained":
        return ""
    return f"in memory, and not on the disk: {_text(drain.data.get('error'))}"


def last_emergency_save(events: list[JournalEvent]) -> EmergencySaveView | None:
    """The newest emergency save of a journal."""
    for event in reversed(events):
        if event.event == "emergency_save":
            return EmergencySaveView(
                number(event.data.get("predicted_seconds"), None),
                number(event.data.get("actual_seconds"), 0.0),
            )
    return None


def save_interval(record: NodeRecord | None) -> SaveIntervalView | None:
    """The automatic interval of the latest run."""
    if record is None or record.save_interval is None:
        return None
    return SaveIntervalView(record.save_interval.seconds, record.save_interval.why)


def _text(value: Any) -> str:
    return printable(value) if isinstance(value, str) else ""
