"""Sizes and durations as people read and write them."""

from __future__ import annotations

import re
from typing import Final

from elastic_ckpt.errors import UsageError

_NUMBER: Final = r"(\d{1,12}(?:\.\d{1,9})?)"
_PARTS: Final = re.compile(
    rf"(?:{_NUMBER} ?d ?)?(?:{_NUMBER} ?h ?)?(?:{_NUMBER} ?m(?:in)? ?)?(?:{_NUMBER} ?s?)?", re.ASCII
)
_SECONDS: Final = (86400.0, 3600.0, 60.0, 1.0)
_SCALES: Final = ((1.0, "s", 99.5), (60.0, "min", 99.5), (3600.0, "h", 47.5))
"""Seconds in a unit, its name, and the count from which the next unit reads better."""


def parse_duration(text: str) -> float:
    """Return the seconds in ``6h30m``, ``90s``, ``2d``, ``4.5 min`` or ``45``; else UsageError."""
    match = _PARTS.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        raise UsageError(f"{text!r} is not a valid duration: write it like 6h30m, 90s or 2d")
    parts = zip(match.groups(), _SECONDS, strict=True)
    return sum(float(part) * unit for part, unit in parts if part)


_BYTES: Final = re.compile(rf"{_NUMBER} ?(?:([kMGT])(i)?)?(?:B|Bytes?)?", re.ASCII | re.IGNORECASE)


def parse_bytes(text: str) -> float:
    """Return the bytes in ``50MB`` or ``1.5 GB`` (powers of 1000), ``64MiB`` (of 1024) or
    ``300000``; else UsageError."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a valid size: write it like 50MB, 1.5GB or 64MiB")
    base = 1024.0 if match[3] else 1000.0
    return float(match[1]) * base ** " kmgt".index((match[2] or " ").lower())


def human_duration(seconds: float | None) -> str:
    """Return a duration in two digits: ``0.2 s``, ``4.5 min``, ``12 d``; ``-`` for None."""
    if seconds is None:
        return "-"
    if seconds < 0.001:
        return "under 1 ms"
    for size, unit, limit in _SCALES:
        if seconds / size < limit:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 86400:.0f} d"


def human_bytes(count: float | None) -> str:
    """Return a size in powers of 1000: ``999 Bytes``, ``1.4 GB``; ``-`` for None."""
    from humanize import naturalsize

    return "-" if count is None else naturalsize(count)
