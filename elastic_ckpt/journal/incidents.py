"""One sentence for each of those events of the journal that need no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from elastic_ckpt.journal.fields import Fields


def _of(found: int | None) -> str:
    return "?" if found is None else str(found)


def _name(fields: Fields, field: str = "path") -> str:
    """The last part of a path."""
    return fields.text(field).rstrip("/").rpartition("/")[2] or "a checkpoint"


def _resize(fields: Fields) -> str:
    before, now = _of(fields.count("before")), _of(fields.count("now"))
    return f"from {before} to {now} ranks, at step {_of(fields.count('step'))}"


def _source(fields: Fields) -> str:
    return f"{fields.text('source', 80)}: {fields.text('what')}"


def _waiting(fields: Fields) -> str:
    return f"{_of(fields.count('present'))} of {_of(fields.count('needed'))} nodes are here"


SENTENCES: Final[Mapping[str, Callable[[Fields], str]]] = {
    "adopted": lambda fields: f"step {_of(fields.count('step'))}, left in memory by a killed run",
    "drain_failed": lambda fields: f"step {_of(fields.count('step'))}: {fields.text('error')}",
    "head_lost": lambda fields: f"{fields.text('head', 80)}: {fields.text('why')}",
    "inexact": lambda fields: f"{_name(fields)}: {fields.text('reason')}",
    "node_joined": lambda fields: fields.text("name", 80),
    "node_left": lambda fields: fields.text("name", 80),
    "notice_source": _source,
    "prune_failed": lambda fields: f"{_name(fields)}: {fields.text('error')}",
    "recovered": lambda fields: f"{_name(fields)}: {fields.text('what')}",
    "reload": lambda fields: fields.text("said"),
    "resize": _resize,
    "save_interval": lambda fields: fields.text("why"),
    "waiting": _waiting,
}
