"""Restores a saved tree to a module or an optimizer: which tensor is read into which memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from elastic_ckpt.errors import CheckpointError
from elastic_ckpt.training.engines.torch.state import canonical_names, numbered, parameter_names
from elastic_ckpt.training.tensors.safetensors_file import NAMED_DTYPES
from elastic_ckpt.training.tensors.shard_index import IndexedTensor, ShardIndex
from elastic_ckpt.training.tensors.state_codec import decode_tree, tensor_name
from elastic_ckpt.util.text import printable


@dataclass(frozen=True)
class Restoration:
    """A prepared load: fill ``wanted`` (name in the index, memory), then call ``finish``."""

    wanted: list[tuple[str, torch.Tensor]]
    finish: Callable[[], object]


class _Placeholders(dict[str, torch.Tensor]):
    """Memory for each tensor that is requested, filled later."""

    def __init__(self, index: ShardIndex) -> None:
        super().__init__()
        self._index = index
        self._names: dict[int, str] = {}

    def __missing__(self, name: str) -> torch.Tensor:
        entry = self._index.tensors[name]
        self[name] = torch.empty(entry.shape, dtype=NAMED_DTYPES[entry.dtype])
        self._names[id(self[name])] = name
        return self[name]

    def name_of(self, value: Any) -> str | None:
        """Return the name of a placeholder; None for anything else."""
        return self._names.get(id(value))


def restore_module(model: nn.Module, tree: Any, index: ShardIndex) -> Restoration:
    """Plan to read a module's state, from :func:`module_state`'s tree, into its own parameters and
    buffers; call it within :func:`rejecting`. ``load_state_dict``, whose hooks may know them, gets
    names that only one side has. CheckpointError if a tensor has another shape."""
    saved: dict[str, Any] = {**tree}
    places = _Placeholders(index)
    state = model.state_dict(keep_vars=True)
    own: dict[int, tuple[str, torch.Tensor]] = {}  # by id: tied weights are read once
    for key, name in canonical_names(model, list(state)).items():
        if name not in saved:
            del state[key]
            continue
        value = saved.pop(name)
        stored = tensor_name(value)
        if stored is None or not isinstance(state[key], torch.Tensor):
            state[key] = decode_tree(value, places)
        else:
            state[key] = _target(name, state[key], index.tensors[stored])
            own[id(state[key])] = (stored, state[key])
    for name, value in saved.items():
        state[name] = decode_tree(value, places)
    # load_state_dict does not copy a parameter to itself.
    return Restoration([*own.values(), *places.items()], lambda: model.load_state_dict(state))


def _target(name: str, own: torch.Tensor, saved: IndexedTensor) -> torch.Tensor:
    """Return the model's memory, or memory of another dtype, which ``load_state_dict`` casts."""
    if list(own.shape) != saved.shape:
        raise CheckpointError(
            f"the script's model does not fit the checkpoint: {printable(name, 80)} has the shape "
            f"{list(own.shape)} instead of {saved.shape}; use the script that saved it, or start "
            "over with a new --dir"
        )
    dtype = NAMED_DTYPES[saved.dtype]
    return own if own.dtype == dtype else torch.empty_like(own.detach(), dtype=dtype)


def restore_optimizer(
    model: nn.Module, optimizer: Any, tree: Any, index: ShardIndex
) -> Restoration:
    """Plan to read an optimizer's state, from :func:`optimizer_state`'s tree, reusing its memory;
    call it within :func:`rejecting`. CheckpointError if its groups have other parameters."""
    places = _Placeholders(index)
    saved: dict[str, Any] = decode_tree(tree, places)
    names = parameter_names(model, optimizer)
    own = optimizer.state_dict() if names is not None else {}
    parameters = numbered(optimizer, own)
    if names is None or parameters is None:
        raise CheckpointError(
            "the script's optimizer has parameters that its model lacks, unlike the checkpoint's: "
            "use the script that saved it, or start over with a new --dir"
        )
    number_of = {names[id(parameter)]: number for number, parameter in parameters.items()}
    groups = _groups(saved["param_groups"], own["param_groups"], number_of)
    state = {}
    for name, held in saved["state"].items():
        parameter = parameters[number_of[name]]
        existing = optimizer.state.get(parameter, {})
        state[number_of[name]] = {
            key: _moment(parameter, existing.get(key), value, places) for key, value in held.items()
        }
    restored = {**saved, "state": state, "param_groups": groups}
    return Restoration([*places.items()], lambda: optimizer.load_state_dict(restored))


def _groups(
    saved: list[dict[str, Any]], own: list[dict[str, Any]], number_of: dict[str, int]
) -> list[dict[str, Any]]:
    """Return the saved groups with the parameters' numbers, in the optimizer's own order."""
    groups = []
    for before, now in zip(saved, own, strict=False):
        numbers = [number_of.get(name, -1) for name in before["params"]]
        if set(numbers) != set(now["params"]):
            break
        groups.append({**before, "params": now["params"]})
    if not len(groups) == len(saved) == len(own):
        raise CheckpointError(
            "the script's optimizer does not fit the checkpoint: "
            + _difference([name for group in saved for name in group["params"]], number_of)
        )
    return groups


def _difference(saved: list[str], number_of: dict[str, int]) -> str:
    """Describe which parameters only one side has, and what to do."""
    missing = [name for name in saved if name not in number_of]
    added = [name for name in number_of if name not in saved]
    parts = [f"it lacks {_some(missing)}"] if missing else []
    parts += [f"the checkpoint lacks {_some(added)}"] if added else []
    what = " and ".join(parts) or "its groups divide the same parameters in another way"
    later = (
        "add what the script adds in a later epoch before the Session, as resume_place().epoch "
        "tells (docs/state.md); or "
        if missing and not added
        else ""
    )
    return f"{what}; {later}use the script that saved it, or start over with a new --dir"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(printable(name, 80) for name in names[:2]) + more


def _moment(parameter: torch.Tensor, existing: Any, value: Any, places: _Placeholders) -> Any:
    """Return the memory for a tensor of a parameter's state, sharded as the parameter is."""
    name = places.name_of(value)
    if name is None or places[name] is not value:
        return value if name is None else places[name]
    target = value
    if _fits(existing, value):
        target = existing
    elif value.shape == parameter.shape and parameter.dim():
        target = torch.empty_like(parameter.detach(), dtype=value.dtype)
    elif isinstance(parameter, DTensor) and value.dim():
        mesh = parameter.device_mesh
        target = DTensor.from_local(
            value.to(parameter.device), mesh, [Replicate()] * mesh.ndim, run_check=False
        )
    places[name] = target
    return target


def _fits(existing: Any, value: torch.Tensor) -> bool:
    return (
        isinstance(existing, torch.Tensor)
        and (existing.shape, existing.dtype) == (value.shape, value.dtype)
        and not existing.is_meta
    )
