"""Where this rank's part of a tensor lies in the whole one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner


class TensorBox(NamedTuple):
    """``sizes`` elements of a tensor from ``offsets`` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def local_boxes(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorBox]:
    """Return this rank's part of each tensor, as torch's planner knows it: of a DTensor its shard,
    of any other all of it. Nothing of a DTensor whose mesh does not have this rank."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({**tensors}, is_coordinator=True)
    found: dict[str, TensorBox] = {}
    for item in planner.create_local_plan().items:
        data: Any = item.tensor_data
        found[item.index.fqn] = TensorBox(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    return found
