"""Saving into the memory tier: which generation, and whether it fits."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from elastic_ckpt.checkpoint.manifest import FileEntry, SealHeader
from elastic_ckpt.checkpoint.memory.mapped_file import Mappings
from elastic_ckpt.checkpoint.memory.part import MemoryPart
from elastic_ckpt.checkpoint.memory.room import room_bytes
from elastic_ckpt.checkpoint.memory.tier import GENERATIONS, Generation, MemoryTier
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.training.tensors.device_copy import pin, unpin
from elastic_ckpt.util.units import human_bytes


@dataclass
class WorkerMemory:
    """A worker's view of its node's tier.

    Attributes:
        mappings: of the files that this rank writes, kept from save to save.
        announced: whether somebody was told how much of the memory it takes.
    """

    tier: MemoryTier
    mappings: Mappings = field(default_factory=lambda: Mappings(pin, unpin))
    announced: bool = False

    def begin(self, needed: int) -> tuple[MemoryTarget | None, str]:
        """A target for a save of about so many bytes, or why there is none. Leader only."""
        held = self.tier.held_bytes()
        total = GENERATIONS * needed
        room = room_bytes(self.tier.root) + held
        if total > room:
            return None, (
                f"the memory tier needs {human_bytes(total)} and {human_bytes(room)} are to be "
                "had: saving to the disk"
            )
        line = "" if self.announced else (
            f"the memory tier takes {human_bytes(total)} of {human_bytes(room)}"
        )  # fmt: skip
        self.announced = True
        generation = self.tier.free()
        if generation is None:
            return None, line
        generation.begin()
        return self.target(generation.slot.name, secrets.token_hex(8)), line

    def target(self, slot: str, identity: str) -> MemoryTarget:
        """The leader's choice, on another rank."""
        return MemoryTarget(self, Generation(self.tier.root / slot), identity)


@dataclass(frozen=True)
class MemoryTarget:
    """One save into one generation; what ``DiskAttempt`` is on disk."""

    memory: WorkerMemory
    generation: Generation
    identity: str
    began: float = field(default_factory=time.monotonic)

    tier: ClassVar[str] = "memory"

    @property
    def path(self) -> Path:
        """The directory that the engine writes to."""
        return self.generation.path

    @property
    def told(self) -> str:
        """What the leader tells the other ranks."""
        return f"memory {self.generation.slot.name} {self.identity}"

    def part(self, rank: int) -> MemoryPart:
        """What a rank writes its part with. Every rank."""
        return MemoryPart(self.generation, rank, self.memory.mappings)

    def seal(self, header: SealHeader, files: Sequence[FileEntry], retention: Retention) -> None:
        """Seal and wake the supervisor, which drains it. Leader only."""
        seconds = time.monotonic() - self.began
        self.generation.close(header, files, seconds, retention)
        self.memory.tier.ring()

    def drop(self) -> None:
        """Nothing to do: it has no seal, and its buffers serve the next save."""
