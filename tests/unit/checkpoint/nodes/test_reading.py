"""Which ranks may load what several nodes have in memory."""

from __future__ import annotations

import pytest

from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.manifest import EngineInfo
from elastic_ckpt.checkpoint.nodes.reading import can_load
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import make_header


@pytest.mark.parametrize(
    ("engine", "ranks", "expected"),
    [
        ("torch", 2, True),
        ("torch", 3, True),
        ("colossalai", 1, True),
        ("another", 2, True),
        ("another", 1, False),
    ],
)
def test_which_engines_state_another_number_of_ranks_loads(
    job: JobDirectory, engine: str, ranks: int, expected: bool
) -> None:
    header = make_header(DiskAttempt(job, "a" * 16, 7), engine=EngineInfo(engine))
    assert can_load(header, ranks) is expected
