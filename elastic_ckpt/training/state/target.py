"""Where a save goes: to the fastest tier with room."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Final

from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.tier import Attempt, Ref, Tier, TierBusy, TierFull
from elastic_ckpt.training.engines import Engine
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.state.rewind import leave_branch

log = logging.getLogger(__name__)

_MARGIN: Final = 1.05
"""How much larger than the last checkpoint the next one may be."""


def begin_attempt(
    runtime: Runtime,
    engine: Engine,
    step: int,
    *,
    allow_memory: bool = True,
    replaces: bool = False,
) -> Attempt:
    """Begin a save: in memory if there is a tier with room, else on disk. Collective. StorageFailed
    on every rank if the disk has no room, or does not answer. ``replaces``: as the memory tier's.
    """
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(runtime.peers.world_size)
    disk = DiskTier(runtime.job, runtime.retain.make_room, runtime.fence, one_host=one_host)
    memory = runtime.memory if allow_memory else None
    tiers: dict[str, Tier] = {tier.name: tier for tier in (memory, disk) if tier is not None}

    def begin() -> Attempt:
        if not runtime.job.attempts.is_dir():
            with contextlib.suppress(OSError):  # without its disk only memory is left
                runtime.fence.check_place()
                runtime.job.prepare()  # it was moved away, and there is work to save
        if runtime.rewound_to is not None:
            leave_branch(runtime, runtime.rewound_to)
            runtime.rewound_to = None
        size = _predicted_bytes(runtime, engine, disk)
        if memory is not None:
            try:
                return memory.begin(step, size, replaces=replaces)
            except TierBusy:
                log.info("saving step %d to the disk: memory waits for its drain", step)
            except TierFull as full:
                runtime.say(f"saving to the disk: {full.reason}")
            except OSError as error:  # something deleted it, say
                _report_memory(runtime, f"{memory.root}: {error.strerror or error}")
        return disk.begin(step, size)

    begun = runtime.peers.leader_does("begin", begin)
    told = runtime.peers.tell("attempt", begun.ref.encode() if begun else b"")
    if begun is not None:
        return begun
    ref = Ref.decode(told)
    return tiers[ref.tier].join(ref)


def _report_memory(runtime: Runtime, problem: str) -> None:
    """Say once that the memory tier cannot be used; saves go to the disk meanwhile."""
    log.warning("the memory tier cannot be used: %s", problem)
    if runtime.memory_problem != problem:
        runtime.memory_problem = problem
        runtime.say(f"saving to the disk, as the memory tier cannot be used: {problem}")


def _predicted_bytes(runtime: Runtime, engine: Engine, disk: DiskTier) -> int:
    """Return the size of the last checkpoint, and at least that of the leader's own tensors."""
    if runtime.last_bytes is None:
        newest = disk.newest()
        runtime.last_bytes = newest.seal.total_bytes if newest and newest.seal else 0
    return int(_MARGIN * max(runtime.last_bytes, engine.state_bytes()))
