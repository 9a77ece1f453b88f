"""Marks for single cases of a parametrized test."""

from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """Return a case that only ``make test-all`` runs."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


def slow_unless(kept: Any, values: Any, names: Any = None) -> list[Any]:
    """Return all values as cases, of which ``make test`` runs those in ``kept`` only."""
    names = [None] * len(values) if names is None else names
    return [
        pytest.param(value, id=name) if (name or value) in kept else slow(value, id=name)
        for value, name in zip(values, names, strict=True)
    ]
