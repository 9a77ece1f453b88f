"""Text that somebody else wrote, made fit for a terminal and for JSON."""

from __future__ import annotations

import json
from typing import Final

MAX_SHOWN: Final = 1000
"""Of a longer name or reason the beginning is shown."""


def printable(text: str, limit: int = MAX_SHOWN) -> str:
    """One line without what would steer a terminal: every other character is spelled out."""
    shown = text[:limit]
    if not shown.isprintable():
        shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in shown)
    return shown if len(text) <= limit else f"{shown}..."


def shown_json(data: bytes) -> str:
    """JSON for a terminal: the same values, with what could steer it written as escapes."""
    text = data.decode()
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def encodable(text: str) -> str:
    """The same text, with bytes of a file name that are no UTF-8 spelled out."""
    return text.encode(errors="backslashreplace").decode()
