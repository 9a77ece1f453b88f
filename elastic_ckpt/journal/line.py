"""The line of JSON that holds an event. Lines come from a directory that anyone may write to.

A field of the wrong type counts as missing, and an event that lacks what it needs is ``Unknown``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Final

import msgspec

import elastic_ckpt.journal.audit_events
import elastic_ckpt.journal.bucket_events
import elastic_ckpt.journal.node_events  # noqa: F401  # their events are kinds, too
from elastic_ckpt.journal.events import JournalEvent, Unknown

MAX_LINE_BYTES: Final = 64 * 1024


class JournalEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An event, and where and when it happened.

    Attributes:
        wall: seconds since the epoch, for people.
        monotonic: seconds on the host's monotonic clock, for durations.
        rank: the worker's; -1 if the writer is not a worker.
        incarnation: the one that ran, or was about to; 0 before the first.
    """

    event: JournalEvent
    wall: float
    monotonic: float
    node: str
    pid: int = 0
    rank: int = -1
    incarnation: int = 0

    @property
    def name(self) -> str:
        """Return the event's name in the journal."""
        return event_name(self.event)

    @property
    def data(self) -> dict[str, Any]:
        """Return the event's fields, as the journal holds them."""
        return event_data(self.event)


class _Line(msgspec.Struct, kw_only=True):
    event: str
    wall: float
    monotonic: float
    node: str
    pid: int = 0
    rank: int = -1
    incarnation: int = 0
    data: msgspec.Raw = msgspec.Raw(b"{}")


KINDS: Final = {
    str(kind.__struct_config__.tag): kind
    for kind in JournalEvent.__subclasses__()
    if kind is not Unknown
}
"""The class of each event, by its name in the journal."""

_DECODERS: Final = {name: msgspec.json.Decoder(kind) for name, kind in KINDS.items()}
_LINES: Final = msgspec.json.Decoder(_Line)


def event_name(event: JournalEvent) -> str:
    """Return an event's name in the journal."""
    return event.name if isinstance(event, Unknown) else str(event.__struct_config__.tag)


def event_data(event: JournalEvent) -> dict[str, Any]:
    """Return an event's fields, as the journal holds them."""
    fields = msgspec.structs.asdict(event)
    if isinstance(event, Unknown):
        fields = {**event.data, "follows": event.follows}
    if not fields["follows"]:
        del fields["follows"]
    return fields


def decode_event(name: str, data: bytes | msgspec.Raw) -> JournalEvent:
    """Return the event of this name with those of these fields that fit."""
    kind = KINDS.get(name)
    if kind is not None:
        with contextlib.suppress(msgspec.MsgspecError, ValueError):
            return _DECODERS[name].decode(data)
    try:
        fields = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError):
        fields = {}
    found: dict[str, Any] = {}
    if "intact" not in fields and "valid" in fields:
        fields["intact"] = fields["valid"]  # its name in version one
    for field in msgspec.structs.fields(kind or JournalEvent):
        with contextlib.suppress(msgspec.ValidationError, KeyError):
            found[field.name] = msgspec.convert(fields[field.name], field.type)
    if kind is not None:
        with contextlib.suppress(TypeError):
            return kind(**found)
    return Unknown(name=name, data=fields, follows=found.get("follows", False))


def decode_line(line: bytes) -> JournalEntry | None:
    """Return the entry that a line holds; None if it is not one."""
    try:
        found = _LINES.decode(line)
        event = decode_event(found.event, found.data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return JournalEntry(
        event=event, wall=found.wall, monotonic=found.monotonic, node=found.node, pid=found.pid,
        rank=found.rank, incarnation=found.incarnation,
    )  # fmt: skip


def encode_line(entry: JournalEntry) -> bytes:
    """Return an entry as JSON; data that JSON cannot hold, or is too long, is cut short."""
    data = entry.data
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        line = _encode(entry, data)
        if len(line) <= MAX_LINE_BYTES:
            return line
    return _encode(entry, {"cut": ascii(data)[:1000]})


def _encode(entry: JournalEntry, data: Mapping[str, Any]) -> bytes:
    line = _Line(
        event=entry.name, wall=entry.wall, monotonic=entry.monotonic, node=entry.node,
        pid=entry.pid, rank=entry.rank, incarnation=entry.incarnation,
        data=msgspec.Raw(msgspec.json.encode(data)),
    )  # fmt: skip
    return msgspec.json.encode(line)
