"""How large a save of all ranks is, as far as one rank can tell from its own tensors."""

from __future__ import annotations

from typing import Any

from colossalai.booster.plugin.torch_fsdp_plugin import TorchFSDPModel
from torch import distributed

from elastic_ckpt.training.engines import tensor_bytes
from elastic_ckpt.training.engines.colossalai.masters import Piece

dist: Any = distributed
"""As in :mod:`elastic_ckpt.training.ranks.peers`."""


def whole_bytes(plugin: Any, model: Any, optimizer: Any, pieces: list[Piece]) -> int:
    """Return about how many bytes of tensors the ranks write together, if each holds as much of the
    model and the same shards as this one. Not collective."""
    state = getattr(getattr(optimizer, "optim", optimizer), "state", None) or {}
    flat = isinstance(model, TorchFSDPModel)  # its parameters are shards
    shards = dist.get_world_size() if flat else _shards_of_state(optimizer)
    weights = tensor_bytes(list(model.parameters())) * (shards if flat else 1)
    masters = sum(tensor_bytes(piece.masters) * piece.shards for piece in pieces)
    states = tensor_bytes(list(state.values())) * shards
    parts = getattr(plugin, "tp_size", 1) * getattr(plugin, "pp_size", 1)
    return int(parts * (weights + states + masters))


def _shards_of_state(optimizer: Any) -> int:
    """Return over how many ranks ZeRO divides the state of a parameter; 1 without it."""
    if hasattr(optimizer, "chunk16_set"):  # Gemini's
        return int(dist.get_world_size(optimizer.module.zero_group))
    stores = getattr(optimizer, "pg_to_bucket_store", {}).values()
    return max((int(store.world_size) for store in stores), default=1)
