"""Fixtures of several files."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import open_job


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")
