"""Fixtures of several files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import open_job
from tests.node_memories import NodeMemories


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


@pytest.fixture
def nodes(job: JobDirectory, tmp_path: Path) -> Iterator[Callable[..., NodeMemories]]:
    """Makes nodes, whose servers end with the test."""
    made: list[NodeMemories] = []

    def make(count: int, **options: Any) -> NodeMemories:
        place = tmp_path / f"memory{len(made)}"
        place.mkdir()
        made.append(NodeMemories(job, place, count, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
