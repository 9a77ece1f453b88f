"""Which checkpoint a load takes. The leader decides; every function is collective."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.lineage import is_stale
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.nodes.tier import NodesMemory
from elastic_ckpt.checkpoint.tier import Ref, Stored, Tier
from elastic_ckpt.errors import NotSealed, NoUsableCheckpoint
from elastic_ckpt.journal.events import MemoryRefused, Quarantined
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.state.candidate import LoadCandidate

MAX_QUARANTINED: Final = 2
"""After this many bad checkpoints in a row the job stops: something else is wrong."""


class CheckpointChoice:
    """Chooses the newest checkpoint, and the next older one after each that is rejected."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._tiers = _tiers(runtime)
        self._set_aside: Counter[str] = Counter()
        self._rejected: set[Ref] = set()
        self._has_asked = False  # the nodes, for what is in their memory

    def newest(self) -> LoadCandidate | None:
        """Return the newest checkpoint that was not rejected; None if there are no checkpoints.
        NoUsableCheckpoint if none is usable, or too many in a row were bad."""
        peers, memory = self._runtime.peers, self._runtime.memory
        if isinstance(memory, NodesMemory) and not self._has_asked:
            self._has_asked = True
            memory.take_in(peers.collect("memory", memory.report, doing="load"))
        chosen = peers.leader_does("choose", self._choose)
        encoded = peers.tell("chosen", chosen.encode() if chosen else b"")
        if not encoded:
            return None
        ref = Ref.decode(encoded)
        if isinstance(memory, NodesMemory) and ref.tier == memory.name:
            memory.learn(ref, peers.tell("shares", memory.tell(ref) if chosen else b""))
        return LoadCandidate(self._runtime, self._tiers[ref.tier], ref)

    def reject(self, ref: Ref, reason: str) -> None:
        """Do not choose this checkpoint again. On disk it is set aside."""
        self._rejected.add(ref)

        def reject() -> None:
            if self._take_out(ref, reason):
                self._set_aside[ref.tier] += 1

        self._runtime.peers.leader_does("reject", reject)

    def _choose(self) -> Ref | None:
        """Of equal checkpoints, the faster tier's is taken."""
        bad = self._set_aside.copy()
        ranks = self._runtime.peers.world_size
        found = self._candidates(ranks)
        unsealed: list[str] = []
        for one in sorted(found, key=lambda one: one.key, reverse=True):
            if one.ref in self._rejected or self._is_off_the_line(one, found):
                continue
            if bad[one.ref.tier] >= MAX_QUARANTINED:
                raise NoUsableCheckpoint(
                    f"{bad[one.ref.tier]} checkpoints in a row failed verification and were moved "
                    f"to {self._quarantine}: fix the storage, then rerun the same command to "
                    f"resume from an older one; elastic-ckpt list {self._runtime.home} shows them"
                )
            if one.why is None:
                return one.ref
            if isinstance(one.why, NotSealed):
                unsealed.append(one.ref.name)  # another program's: never moved, never chosen
                continue
            self._take_out(one.ref, str(one.why))
            bad[one.ref.tier] += 1
        if bad.total() or unsealed:
            raise NoUsableCheckpoint(
                f"no checkpoint in {self._runtime.home} is usable"
                + (f" ({', '.join(unsealed[:3])} not sealed)" if unsealed else "")
                + f": see elastic-ckpt list {self._runtime.home}, or start over with a new --dir"
            )
        return None

    @property
    def _quarantine(self) -> str:
        bucket = self._runtime.bucket
        return f"{bucket.url}/aside/" if bucket else str(self._runtime.job.quarantine)

    def _candidates(self, ranks: int) -> list[Stored]:
        """Return what the tiers hold; while the disk is not mounted, memory alone if it has any."""
        found: list[Stored] = []
        for tier in self._tiers.values():
            try:
                found += tier.candidates(ranks)
            except FileNotFoundError:  # the directory itself
                if not found:
                    raise
        if not found:
            self._runtime.fence.check_place()
        return found

    def _is_off_the_line(self, one: Stored, found: list[Stored]) -> bool:
        """Return whether it is in memory, and the job has gone on without it: an earlier run left
        it, or it was on the disk and was set aside there."""
        if one.ref.tier != MemoryTier.name or one.seal is None:
            return False
        memory, bucket, job = self._runtime.memory, self._runtime.bucket, self._runtime.job
        if isinstance(memory, NodesMemory) and memory.was_drained(one.seal.attempt):
            durable = [each for each in found if each.ref.tier != MemoryTier.name]
            if was_set_aside(one.key, one.seal.attempt, durable):
                return True
        if bucket is not None:
            return bucket.tier(job).has_gone_past(one.seal.run)
        return is_stale(job, one.seal, self._runtime.fence)

    def _take_out(self, ref: Ref, reason: str) -> bool:
        """Return whether it was moved; one that was deleted meanwhile is not."""
        tier, journal = self._tiers[ref.tier], self._runtime.journal
        path, to = tier.where(ref), tier.reject(ref, reason)
        if to:
            journal.write(Quarantined(path=path, to=to, reason=reason))
        elif not tier.every_byte:
            self._runtime.say(f"not loaded from memory, but from an older checkpoint: {reason}")
            journal.write(MemoryRefused(path=path, reason=reason))
        return bool(to)


def was_set_aside(key: tuple[int, int], attempt: str, durable: Sequence[Stored]) -> bool:
    """Return whether an attempt that has been on the disk is there no more, of ``durable`` ones. A
    damaged one may still be it; without any the disk may not be mounted."""
    there = [one.seal for one in durable if one.key == key]
    return bool(durable) and all(seal and seal.attempt != attempt for seal in there)


def given(runtime: Runtime, path: Path) -> LoadCandidate:
    """Return a checkpoint that the caller named: on disk, or in memory if not on disk yet."""

    def look() -> Ref:
        is_alone = not isinstance(runtime.memory, NodesMemory)
        if is_alone and not os.path.lexists(path) and runtime.memory is not None:
            for held in runtime.memory.own():
                if runtime.job.checkpoint(*held.key) == path:
                    return held.stored.ref
        if runtime.bucket is not None:
            return runtime.bucket.tier(runtime.job).named(path.name)
        return Ref(DiskTier.name, str(path))

    found = runtime.peers.leader_does("where", look)
    ref = Ref.decode(runtime.peers.tell("place", found.encode() if found else b""))
    return LoadCandidate(runtime, _tiers(runtime)[ref.tier], ref)


def _tiers(runtime: Runtime) -> dict[str, Tier]:
    """Return the tiers that a restart reads, the fastest first."""
    tiers: tuple[Tier | None, ...] = (runtime.memory, runtime.durable)
    return {tier.name: tier for tier in tiers if tier is not None}
