"""Fixtures of several files."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The place of the memory tiers, in /dev/shm's stead."""
    found = tmp_path / "memory"
    found.mkdir()
    return found
