"""Plain torch: a bare module or DistributedDataParallel, through torch's own state dicts.

Replicas hold the same state, so rank 0 writes and every rank reads. Files are safetensors and
JSON; nothing is pickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from elastic_ckpt.core.manifest import EngineInfo
from elastic_ckpt.store.part import Part
from elastic_ckpt.training.engines import tensor_bytes
from elastic_ckpt.training.state_codec import read_state, write_state


class TorchEngine:
    """Saves ``model``, ``optimizer`` and ``lr_scheduler``; the last two may be None."""

    def __init__(self, model: Any, optimizer: Any, lr_scheduler: Any) -> None:
        wrapped = isinstance(model, DistributedDataParallel)
        self._model = model.module if wrapped else model
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self.info = EngineInfo(
            name="torch",
            version=str(torch.__version__),
            plugin="ddp" if wrapped else "module",
            precision=_precision(self._model),
        )

    def save(self, directory: Path, part: Part) -> None:
        """Not collective: rank 0 writes."""
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        for name, thing in self._things():
            write_state(part, f"{name}/state", thing.state_dict())

    def load(self, directory: Path) -> None:
        """Not collective: every rank reads the same files."""
        for name, thing in self._things():
            thing.load_state_dict(read_state(directory / name, "state"))

    def state_bytes(self) -> int:
        """Rank 0 writes all of it."""
        return sum(tensor_bytes(thing.state_dict()) for _, thing in self._things())

    def _things(self) -> list[tuple[str, Any]]:
        things = {
            "modeling": self._model,
            "optimizer": self._optimizer,
            "lr_scheduler": self._lr_scheduler,
        }
        return [(name, thing) for name, thing in things.items() if thing is not None]


def _precision(model: Any) -> str:
    kinds = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    return "+".join(sorted(kinds))
