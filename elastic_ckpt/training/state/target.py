"""Where a save goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from elastic_ckpt.checkpoint.catalog import newest_intact
from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.disk.part import Part
from elastic_ckpt.checkpoint.disk.space import ensure_space
from elastic_ckpt.checkpoint.manifest import FileEntry, SealHeader
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.training.engines import Engine
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.worker_memory import MemoryTarget, WorkerMemory

_MARGIN: Final = 1.05
"""What the next checkpoint may be larger than the last one."""


@dataclass(frozen=True)
class DiskTarget:
    """One save straight to the disk; as :class:`MemoryTarget`."""

    attempt: DiskAttempt
    tier: ClassVar[str] = "disk"

    @property
    def identity(self) -> str:
        """Of the attempt."""
        return self.attempt.identity

    @property
    def path(self) -> Path:
        """The directory that the engine writes to."""
        return self.attempt.path

    @property
    def told(self) -> str:
        """What the leader tells the other ranks."""
        return f"disk - {self.identity}"

    def part(self, rank: int) -> Part:
        """What a rank writes its part with. Every rank."""
        return self.attempt.part(rank)

    def seal(self, header: SealHeader, files: Sequence[FileEntry], _: Retention) -> None:
        """Seal; retention is the caller's. Leader only."""
        self.attempt.seal(header, files)

    def drop(self) -> None:
        """Remove what was written. Leader only."""
        self.attempt.drop()


Target = DiskTarget | MemoryTarget


def choose_target(
    runtime: Runtime, engine: Engine, step: int, memory: WorkerMemory | None
) -> Target:
    """Where a save goes: into ``memory`` if there is one with room, else to the disk. Collective.

    Raises:
        StorageFailed: on every rank; there is no room on the disk, or it does not answer.
    """

    def begin() -> Target:
        if not runtime.job.attempts.is_dir():
            runtime.job.prepare()  # somebody moved it; there is work to be kept
        needed = _predicted_bytes(runtime, engine)
        if memory is not None:
            target, line = memory.begin(needed)
            if line:
                runtime.say(line)
            if target is not None:
                return target
        ensure_space(runtime.job.root, needed, runtime.retain.make_room)
        return DiskTarget(DiskAttempt.begin(runtime.job, step))

    made = runtime.peers.leader_does("begin", begin)
    told = runtime.peers.tell("attempt", (made.told if made else "").encode()).decode()
    if made is not None:
        return made
    tier, slot, identity = told.split(" ")
    if tier == "memory" and memory is not None:
        return memory.target(slot, identity)
    return DiskTarget(DiskAttempt(runtime.job, identity, step))


def _predicted_bytes(runtime: Runtime, engine: Engine) -> int:
    """What the last checkpoint took, and at least what the leader's own tensors take."""
    if runtime.last_bytes is None:  # a look at all checkpoints, of which there may be thousands
        newest = newest_intact(runtime.job)
        runtime.last_bytes = newest.manifest.total_bytes if newest and newest.manifest else 0
    return int(_MARGIN * max(runtime.last_bytes, engine.state_bytes()))
