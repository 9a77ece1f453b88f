"""The fields of a journal's event: read without trust, as another version may have written them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Protocol

from elastic_ckpt.util.text import MAX_SHOWN, printable

MAX_COUNT: Final = 10**15
MAX_SECONDS: Final = 1e10
_MAX_VALUE: Final = 1e100
_MAX_ITEMS: Final = 64
"""Of a list or an object the beginning is read."""


class Entry(Protocol):
    """One event of a journal, as the store reads it; what stands in ``data`` is anybody's guess."""

    @property
    def event(self) -> str:
        """What happened."""

    @property
    def wall(self) -> float:
        """When, in seconds since the epoch."""

    @property
    def node(self) -> str:
        """Whose journal it is."""

    @property
    def incarnation(self) -> int:
        """That ran, or was about to."""

    @property
    def data(self) -> dict[str, Any]:
        """The event's own fields."""


class Fields:
    """One event's ``data``: of each field a value of the type that was asked for, or none."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data

    def text(self, name: str, limit: int = MAX_SHOWN) -> str:
        """One printable line; empty where there is none."""
        value = self._data.get(name)
        return printable(value, limit) if isinstance(value, str) else ""

    def texts(self, name: str, limit: int = MAX_SHOWN) -> tuple[str, ...]:
        """Printable lines: the last ones of many."""
        value = self._data.get(name)
        lines = value if isinstance(value, list | tuple) else ()
        return tuple(printable(one, limit) for one in lines[-_MAX_ITEMS:] if isinstance(one, str))

    def value(self, name: str) -> float | None:
        """A finite number."""
        return finite(self._data.get(name))

    def seconds(self, name: str) -> float | None:
        """A span of time."""
        found = self.value(name)
        return None if found is None else min(max(0.0, found), MAX_SECONDS)

    def count(self, name: str) -> int | None:
        """A whole number that is not negative."""
        found = self.value(name)
        return None if found is None or found < 0 else int(min(found, MAX_COUNT))

    def code(self, name: str) -> int | None:
        """A small whole number, which may be negative."""
        found = self.value(name)
        return None if found is None else int(min(max(found, -MAX_COUNT), MAX_COUNT))

    def values(self, name: str) -> dict[str, float]:
        """Finite numbers by name."""
        found = self._data.get(name)
        items = list(found.items())[:_MAX_ITEMS] if isinstance(found, Mapping) else []
        named = {printable(str(key), 80): finite(value) for key, value in items}
        return {key: value for key, value in named.items() if value is not None}

    def flag(self, name: str) -> bool:
        """Whether it is true."""
        return self._data.get(name) is True


def finite(value: Any) -> float | None:
    """A number that can be drawn and added up; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) and abs(found) <= _MAX_VALUE else None
