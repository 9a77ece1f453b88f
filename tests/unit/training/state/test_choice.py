"""Which checkpoint a restart loads when memory and disk are of different runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.ownership import fence as fences
from elastic_ckpt.checkpoint.ownership.fence import Fence
from elastic_ckpt.errors import StorageFailed
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.training.ranks.peers import Peers
from elastic_ckpt.training.state.choice import CheckpointChoice, was_set_aside
from tests.checkpoints import make_checkpoint
from tests.memory_tiers import own, snapshot


@pytest.mark.parametrize(
    ("on_disk", "in_memory", "rewound", "chosen"),
    [
        (1, 1, 0, "memory"),  # the run was killed before its drain
        (2, 1, 0, "disk"),  # run 2 continued on another node, from an older step
        (1, 1, 2, "disk"),  # run 2 went back: what was left before is off the line
        (1, 3, 3, "memory"),  # this run's own
    ],
)
def test_memory_of_an_earlier_run_counts_until_a_later_one_has_sealed(
    job: JobDirectory, tmp_path: Path, on_disk: int, in_memory: int, rewound: int, chosen: str
) -> None:
    place = tmp_path / "memory"
    place.mkdir()
    held = own(place, job)
    make_checkpoint(job, 110, world_size=1, run=on_disk)
    assert snapshot(job, held.tier, 130, world_size=1, run=in_memory) is not None
    runtime: Any = SimpleNamespace(
        job=job, memory=held.tier, peers=Peers(0, 1, None, 60.0), journal=Journal(job, "here"),
        say=print, bucket=None, durable=DiskTier(job), home="",
        fence=Fence(job, 3, "nonce", rewound=rewound),
    )  # fmt: skip
    found = CheckpointChoice(runtime).newest()
    assert found is not None and found.ref.tier == chosen
    held.release(remove=True)


HERE, OTHER = "here", "other"
NEWER, SAME, OLDER = (0, 130), (0, 120), (0, 110)


@pytest.mark.parametrize(
    ("on_disk", "was"),
    [
        ([], False),  # it may not be mounted
        ([(SAME, HERE)], False),
        ([(SAME, OTHER)], True),  # another one has taken its place
        ([(SAME, "")], False),  # damaged there, and whole in memory
        ([(OLDER, OTHER)], True),  # the job went back, and saved on disk since
        ([(NEWER, OTHER), (OLDER, OTHER)], True),
    ],
)
def test_what_was_set_aside_on_the_disk_does_not_come_back_from_memory(
    on_disk: list[tuple[tuple[int, int], str]], was: bool
) -> None:
    durable: Any = [
        SimpleNamespace(key=key, seal=SimpleNamespace(attempt=attempt) if attempt else None)
        for key, attempt in on_disk
    ]
    assert was_set_aside(SAME, HERE, durable) is was


@pytest.mark.parametrize("is_covered", [False, True])
def test_without_its_disk_a_job_restarts_from_memory_or_not_at_all(
    job: JobDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_covered: bool
) -> None:
    """It would begin at step 0, and go on from there once the disk is back."""
    monkeypatch.setattr(fences, "mount_of", lambda directory: 2)
    place = tmp_path / "memory"
    place.mkdir()
    held = own(place, job)
    make_checkpoint(job, 110, world_size=1, run=1)
    runtime: Any = SimpleNamespace(
        job=job, memory=held.tier, peers=Peers(0, 1, None, 60.0), journal=Journal(job, "here"),
        say=print, bucket=None, durable=DiskTier(job), home="",
        fence=Fence(job, 1, "nonce", mount=1),
    )  # fmt: skip
    shutil.rmtree(job.root)
    if is_covered:
        job.root.mkdir()
    with pytest.raises(StorageFailed):
        CheckpointChoice(runtime).newest()
    assert snapshot(job, held.tier, 130, world_size=1, run=1) is not None
    found = CheckpointChoice(runtime).newest()
    assert found is not None and found.ref.tier == "memory"
    held.release(remove=True)
