"""Spans of time as people write and read them."""

from __future__ import annotations

import re
from typing import Final

from elastic_ckpt.errors import UsageError

_NUMBER: Final = r"(\d{1,12}(?:\.\d{1,9})?)"
_PARTS: Final = re.compile(
    rf"(?:{_NUMBER}d)?(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s?)?", re.ASCII
)
_SECONDS: Final = (86400.0, 3600.0, 60.0, 1.0)
_READ: Final = ((1.0, "s", 99.5), (60.0, "min", 99.5), (3600.0, "h", 47.5))
"""Seconds of a unit, its name, and the number of it from which on the next one reads better."""


def parse_duration(text: str) -> float:
    """Read ``6h30m``, ``90s``, ``2d`` or ``45`` (seconds); returns seconds.

    Raises:
        UsageError: the text is nothing of the kind.
    """
    match = _PARTS.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        raise UsageError(f"{text!r} is no duration: write it like 6h30m, 90s or 2d")
    parts = zip(match.groups(), _SECONDS, strict=True)
    return sum(float(part) * unit for part, unit in parts if part)


def human_duration(seconds: float) -> str:
    """``0.2 s``, ``4.5 min``, ``6 h``, ``12 d``: two digits, as a sentence wants it."""
    if seconds < 0.001:
        return "under 1 ms"
    for size, unit, limit in _READ:
        if seconds / size < limit:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 86400:.0f} d"
