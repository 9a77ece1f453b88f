"""Text from outside, made safe for a terminal and for JSON."""

from __future__ import annotations

import json
import re
from typing import Final

MAX_SHOWN: Final = 1000
"""Characters shown of a longer name or reason."""

_SEQUENCE: Final = re.compile("\x1b\\[[0-9;?]*[ -/]*[@-~]")
"""A colour, or a movement of the cursor."""


def folded(line: str) -> str:
    """Return a line that a program printed as a terminal leaves it: of a progress bar, which goes
    back to the start of its line with ``\\r``, the last state; without colours."""
    states = _SEQUENCE.sub("", line).rstrip("\r\n").split("\r")
    return next((state for state in reversed(states) if state.strip()), "")


def printable(text: str, limit: int = MAX_SHOWN) -> str:
    """Return the text on one line, with characters that could steer a terminal escaped."""
    shown = text[:limit]
    if not shown.isprintable():
        shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in shown)
    return shown if len(text) <= limit else f"{shown}..."


def shown_json(data: bytes) -> str:
    """Return JSON with the same values, with characters that could steer a terminal escaped."""
    text = data.decode()
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def encodable(text: str) -> str:
    """Return the text with bytes of a file name that are not UTF-8 escaped."""
    return text.encode(errors="backslashreplace").decode()
