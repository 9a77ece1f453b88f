"""What a model's state holds besides its parameters: buffers, and what modules add to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from elastic_ckpt.errors import CheckpointError, CheckpointRejected, UsageError
from elastic_ckpt.training.engines.torch.state import canonical_names
from elastic_ckpt.training.tensors.state_codec import TreeEncoder, check_tensor
from elastic_ckpt.util.text import printable

_EXTRA_STATE: Final = "_extra_state"


@dataclass(frozen=True)
class _Place:
    """Where a value is: a buffer, or with None a module that has an extra state."""

    module: nn.Module
    buffer: torch.Tensor | None


def module_values(model: Any) -> dict[str, Any]:
    """Return the model's persistent buffers and extra states, by name; not copied.

    What our files cannot hold is left to the engine, as are DTensors, of which each rank has a
    shard by design.
    """
    values: dict[str, Any] = {}
    for name, place in _places(model).items():
        value = place.module.get_extra_state() if place.buffer is None else place.buffer
        if _is_storable(value, name):
            values[name] = value
    return values


def restore_module_values(model: Any, saved: dict[str, Any]) -> None:
    """Put values of :func:`module_values` back in place.

    Raises:
        CheckpointRejected: a buffer's value is not a tensor.
        CheckpointError: the model lacks one, or has it in another shape.
    """
    places = _places(model) if saved else {}
    for name, value in saved.items():
        place = places.get(name)
        if place is not None and place.buffer is None:
            place.module.set_extra_state(value)
            continue
        if not isinstance(value, torch.Tensor):
            raise CheckpointRejected(f"this rank's {printable(name, 80)} is not a tensor")
        if place is None or place.buffer is None or place.buffer.shape != value.shape:
            raise CheckpointError(
                f"the script's model does not fit the checkpoint, in which this rank's own "
                f"{printable(name, 80)} has the shape {list(value.shape)}: use the script that "
                "saved it, or start over with a new --dir"
            )
        with torch.no_grad():
            place.buffer.copy_(value)


def broadcast_names(model: Any) -> set[str]:
    """Return the buffers that DDP overwrites with rank 0's before each forward pass."""
    wrappers = [one for one in _modules(model) if isinstance(one, DistributedDataParallel)]
    sent = {
        id(buffer)
        for wrapper in wrappers
        if getattr(wrapper, "forward_sync_buffers", wrapper.broadcast_buffers)
        for name, buffer in wrapper.module.named_buffers()
        if name not in wrapper.parameters_to_ignore
    }
    return {name for name, place in _places(model).items() if id(place.buffer) in sent}


def _modules(model: Any) -> Iterator[nn.Module]:
    return model.modules() if isinstance(model, nn.Module) else iter(())


def _places(model: Any) -> dict[str, _Place]:
    """Return where the values are, without a call of ``state_dict``: a plugin's may gather."""
    if not isinstance(model, nn.Module):
        return {}
    found: dict[str, _Place] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:  # has no public name
                found[prefix + name] = _Place(module, buffer)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            found[prefix + _EXTRA_STATE] = _Place(module, None)
    names = canonical_names(model, found)
    return {names[key]: place for key, place in found.items()}


def _is_storable(value: Any, name: str) -> bool:
    try:
        if isinstance(value, torch.Tensor):
            check_tensor(value, name)
        else:
            TreeEncoder({}).encode(value, name)
    except UsageError:
        return False
    return True
