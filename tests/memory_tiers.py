"""Generations for tests, made as a job's ranks make them, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.manifest import FileEntry
from elastic_ckpt.checkpoint.memory.generation import Sealed
from elastic_ckpt.checkpoint.memory.mapped_file import Mappings
from elastic_ckpt.checkpoint.memory.owned_tier import OwnedTier
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.tier import TierBusy
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.retention import Retention
from tests.checkpoints import FILES, make_header


def own(place: Path, job: JobDirectory, node: str = "here") -> OwnedTier:
    """Take the job's tier, as a supervisor does."""
    return OwnedTier(place, job, node)


def snapshot(
    job: JobDirectory,
    tier: MemoryTier,
    step: int,
    *,
    contents: Mapping[str, bytes] = FILES,
    world_size: int = 2,
    mappings: Mappings | None = None,
    retention: Retention | None = None,
    **changes: Any,
) -> Sealed | None:
    """Save into a free generation; None if there is none."""
    tier = MemoryTier(tier.root, mappings)
    try:
        attempt = tier.begin(step, 0, f"{step:016x}")
    except TierBusy:
        return None
    header = make_header(
        DiskAttempt(job, attempt.ref.attempt, step), world_size=world_size, **changes
    )
    files: list[FileEntry] = []
    for rank in range(world_size):
        part = attempt.part(rank)
        own_files = {f"ranks/{rank:05d}.json": b'{"rank":%d}' % rank}
        for name, data in {**own_files, **(contents if rank == 0 else {})}.items():
            with part.open(name, len(data)) as file:
                file.write(data)
        files += part.finish(world_size, header)
    attempt.seal(header, files, retention or Retention())
    return next(one for one in tier.sealed() if one.seal.step == step)
