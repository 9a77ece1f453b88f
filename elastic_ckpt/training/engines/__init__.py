"""What writes and reads model and optimizer state, behind one small interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from elastic_ckpt.core.manifest import EngineInfo


class Engine(Protocol):
    """Writes the state of model, optimizer and scheduler below a directory, and reads it back.

    Both calls are made on every rank and may be collective. What they write outside ``ranks/``
    and ``parts/`` belongs to the leader's part.
    """

    info: EngineInfo

    def save(self, directory: Path) -> None:
        """Write everything; complete, not necessarily durable, when every rank has returned."""

    def load(self, directory: Path) -> None:
        """Restore everything from a checkpoint that was verified in full."""


def make_engine(booster: Any, model: Any, optimizer: Any, lr_scheduler: Any) -> Engine:
    """ColossalAI's engine where there is a booster, torch's own otherwise."""
    if booster is None:
        from elastic_ckpt.training.engines.torch import TorchEngine

        return TorchEngine(model, optimizer, lr_scheduler)
    from elastic_ckpt.training.engines.colossalai import ColossalAIEngine

    return ColossalAIEngine(booster, model, optimizer, lr_scheduler)
