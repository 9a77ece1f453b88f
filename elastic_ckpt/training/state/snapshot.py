"""What describes a save besides the state itself, and the header of its seal."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import torch

from elastic_ckpt.checkpoint.manifest import EngineInfo, Reason, SealHeader
from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.protocol.agreement import ActionKind
from elastic_ckpt.training.runtime import Runtime

REASONS: Final[dict[ActionKind, Reason]] = {
    ActionKind.SAVE: "interval",
    ActionKind.SAVE_NOW: "manual",
    ActionKind.STOP: "emergency",
}
"""The reason of a save that all ranks agreed on."""


@dataclass(frozen=True)
class Snapshot:
    """What describes a save besides the state itself.

    Attributes:
        running_states: contents of ``running_states.json``, in ColossalChat's keys and units.
        samples_per_step: samples of one step on all ranks together; 0 if unknown.
        data_parallel_size: ranks that see different samples.
        rank_state: returns this rank's own state, called while saving; None to save none.
        metrics: what the script reported, for retention.
    """

    reason: Reason
    position: Position
    running_states: dict[str, int]
    samples_per_step: int = 0
    data_parallel_size: int = 1
    rank_state: Callable[[], dict[str, Any]] | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def make_header(
    runtime: Runtime, engine: EngineInfo, snapshot: Snapshot, attempt: str
) -> SealHeader:
    """Return what a seal contains besides its files; ``attempt`` is the attempt's identity."""
    return SealHeader(
        job=runtime.name,
        attempt=attempt,
        incarnation=runtime.incarnation,
        run=runtime.run,
        parent=runtime.parent,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        reason=snapshot.reason,
        samples_per_step=snapshot.samples_per_step,
        world_size=runtime.peers.world_size,
        data_parallel_size=snapshot.data_parallel_size,
        engine=engine,
        torch=str(torch.__version__),
        metrics=snapshot.metrics,
        session=runtime.job.name,
        session_order=runtime.session_order,
        automatic=runtime.automatic and snapshot.reason in ("interval", "emergency"),
        **msgspec.structs.asdict(snapshot.position),
    )
