"""The memory tier: two generations of a node's newest checkpoints, in shared memory.

::

    /dev/shm/elastic-ckpt-0-3f9c.../     one job on this machine, for its owner alone
        owner.json                       whose it is; locked while the supervisor lives
        bell                             a FIFO: a byte in it means that something was sealed
        a/  b/                           the two generations
            state/                       laid out as a checkpoint
            seal.json                    sizes and attempt; it goes before anything is overwritten
            settled                      the attempt that is on disk, and may be overwritten
            keeper                       the attempt that another node keeps, as this one leaves
            copied                       the attempt of which another node has a copy
            places.json                  where the shares of it are after another run has loaded it
            spare/                       the buffers of what stood here before, to be written again

The files belong to no worker: they outlive the death of any process of the job. A generation is
never overwritten or removed while a process reads it, nor before it or a newer one is on disk; only
if the disk refuses a save, the older of two makes room for it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from elastic_ckpt.checkpoint.manifest import SealHeader
from elastic_ckpt.checkpoint.memory.generation import (
    GENERATIONS,
    NAME,
    SLOTS,
    Generation,
    Sealed,
    check_covers,
)
from elastic_ckpt.checkpoint.memory.mapped_file import Mappings
from elastic_ckpt.checkpoint.memory.owner import is_private, read_tier_owner
from elastic_ckpt.checkpoint.memory.part import MemoryAttempt
from elastic_ckpt.checkpoint.memory.room import room_bytes
from elastic_ckpt.checkpoint.tier import Reading, Ref, Stored, TierBusy, TierFull
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.progress import Watch
from elastic_ckpt.util.units import human_bytes


class MemoryTier:
    """One job's generations on this node. See :class:`elastic_ckpt.checkpoint.tier.Tier`.

    Args:
        root: the tier's directory.
        mappings: of the files that this process writes, kept from save to save.
        session: whose generations a restart may take; both serve all sessions of the job.
    """

    name = NAME
    every_byte = False

    def __init__(self, root: Path, mappings: Mappings | None = None, session: str = "") -> None:
        self.root = root
        self._mappings = mappings or Mappings()
        self._session = session

    def of_session(self, name: str) -> MemoryTier:
        """Return the same tier for another session."""
        return MemoryTier(self.root, self._mappings, name)

    @property
    def generations(self) -> list[Generation]:
        """Both, sealed or not."""
        return [Generation(self.root / name) for name in SLOTS]

    def sealed(self) -> list[Sealed]:
        """Return what can be loaded or drained, of all sessions, newest first."""
        found = [(one, one.seal()) for one in self.generations]
        intact = [Sealed(one, seal) for one, seal in found if seal is not None]
        return sorted(intact, key=lambda one: one.age, reverse=True)

    def own(self) -> list[Sealed]:
        """Return what this session can load, newest first."""
        return [one for one in self.sealed() if one.seal.session == self._session]

    def undrained(self) -> list[Sealed]:
        """Return what is not on disk yet, oldest first."""
        return [one for one in reversed(self.sealed()) if not one.settled]

    @property
    def is_unclear(self) -> bool:
        """Whether it may hold a checkpoint that this process cannot read: it must stay."""
        return any(one.is_unclear for one in self.generations)

    @property
    def keeps_work(self) -> bool:
        """Whether anything in it may be nowhere else."""
        return self.is_unclear or bool(self.undrained())

    def begin(
        self, step: int, size: int, identity: str | None = None, *, replaces: bool = False
    ) -> MemoryAttempt:
        """Overwrite what has no seal, or is on disk; if it ``replaces``, the older of two that are
        not, so that memory holds the newest while the disk refuses it."""
        room = room_bytes(self.root) + self.held_bytes()
        if GENERATIONS * size > room:
            raise TierFull(
                0,
                f"the memory tier needs {human_bytes(GENERATIONS * size)}, and only "
                f"{human_bytes(room)} are available",
            )
        generation = self.free() or (self._older() if replaces else None)
        if generation is None:
            raise TierBusy(0, "both generations of the memory tier wait for their drain")
        generation.begin()
        return MemoryAttempt(generation, identity or secrets.token_hex(8), self._mappings)

    def join(self, ref: Ref) -> MemoryAttempt:
        return MemoryAttempt(self._generation(ref), ref.attempt, self._mappings)

    def newest(self) -> Stored | None:
        return next((one.stored for one in self.own() if one.seal.is_whole), None)

    def candidates(self, world_size: int) -> list[Stored]:
        """Return those of this world size: a generation cannot be resharded. A share of one that
        several nodes saved is for their ranks together."""
        whole = [one for one in self.own() if one.seal.is_whole]
        return [one.stored for one in whole if one.seal.world_size == world_size]

    def holds(self, seal: SealHeader) -> bool:
        return any(one.seal.attempt == seal.attempt for one in self.sealed())

    def open(self, ref: Ref) -> Reading:
        return MemoryReading(self._generation(ref), ref)

    def where(self, ref: Ref) -> str:
        return str(self.root / ref.name)

    def reject(self, ref: Ref, why: str) -> str:
        """Leave it until a save overwrites it."""
        return ""

    def free(self) -> Generation | None:
        """Return a generation that may be overwritten, its seal removed; None if there is none. The
        other keeps its seal, whatever happens to the new one. Leader only."""
        sealed = self.sealed()
        held = {one.generation for one in sealed}
        for generation in self.generations:
            if generation not in held and not generation.is_unclear and generation.clear():
                return generation
        for one in reversed(sealed):
            if one.settled and one.generation.clear():
                return one.generation
        return None

    def _older(self) -> Generation | None:
        """Return the older of two generations of this session, its seal removed; None if a process
        reads it, or the other one is not a newer checkpoint."""
        sealed = self.sealed()
        if len(sealed) < GENERATIONS or len(self.own()) < GENERATIONS:
            return None
        return sealed[-1].generation if sealed[-1].generation.clear() else None

    def held_bytes(self) -> int:
        """Return the bytes of all buffers."""
        total = 0
        for directory, _, names in os.walk(self.root):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(directory, name)).st_blocks * 512
        return total

    def _generation(self, ref: Ref) -> Generation:
        if ref.name not in SLOTS:
            raise CheckpointRejected(f"the memory tier has no generation {ref.name!r}")
        return Generation(self.root / ref.name)


class MemoryReading:
    """See :class:`elastic_ckpt.checkpoint.tier.Reading`. The seal has only sizes."""

    rest = None

    def __init__(self, generation: Generation, ref: Ref) -> None:
        """Lock the generation against being overwritten; raises as the protocol's ``open``."""
        self.ref = ref
        self.path = generation.path
        self._lock = generation.lock()
        seal = generation.seal()
        if seal is None or seal.attempt != ref.attempt:
            self.close()
            raise CheckpointRejected("it is not sealed, was overwritten, or a file is missing")
        self.seal = seal

    def verify(self, rank: int, world_size: int, watch: Watch) -> None:
        """Check the ranks alone: ``open`` compared the sizes."""
        check_covers(self.seal, world_size)

    def confirm(self) -> None:
        """Accept it: only the ranks write to a generation, and they are loading it."""

    def mark_verified(self) -> None:
        """Do nothing: no byte was hashed."""

    def close(self) -> None:
        self._lock.release()


def tier_of(job: JobDirectory, root: str) -> MemoryTier | None:
    """Return the tier named in a record of the job directory, if it exists and is this job's."""
    path = Path(root)
    owner = read_tier_owner(path) if root and is_private(path) else None
    with contextlib.suppress(OSError):
        if owner and (owner.root, owner.identity) == (str(job.root), job.known_identity()):
            return MemoryTier(path)
    return None
