"""Entries of a journal, made from what its lines hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from elastic_ckpt.journal.line import JournalEntry, decode_event


def happened(
    wall: float,
    name: str,
    data: Mapping[str, Any] | None = None,
    *,
    monotonic: float | None = None,
    node: str = "here",
    incarnation: int = 1,
) -> JournalEntry:
    """Return an entry; ``monotonic`` is ``wall`` by default, both in seconds."""
    return JournalEntry(
        event=decode_event(name, json.dumps(data or {}).encode()),
        wall=wall,
        monotonic=wall if monotonic is None else monotonic,
        node=node,
        incarnation=incarnation,
    )
