"""The state of a module and of its optimizer: a tree without tensors, and tensors by name.

Parameters have the names of the bare model, also in the optimizer's state, so that one kind of
parallelism reads what another one wrote. torch's own ``get_optimizer_state_dict`` is not used: it
makes a step if the optimizer has made none, which changes the training.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from elastic_ckpt.errors import UsageError
from elastic_ckpt.training.tensors.state_codec import TreeEncoder, check_tensor


@dataclass(frozen=True)
class PartState:
    """One part of a checkpoint, as a rank holds it.

    Attributes:
        tree: JSON values, with tensors as tags that contain their names. A module's is an object
            with a tree by name.
        tensors: by name; a DTensor represents this rank's shard.
        alike: names of tensors with the same contents on every rank, so that any rank may write
            them. Rank 0 writes its own of those that are neither here nor DTensors.
    """

    tree: Any
    tensors: dict[str, torch.Tensor]
    alike: frozenset[str]


class _Collector(TreeEncoder):
    """Collects tensors without a copy; one that occurs twice is kept once."""

    def __init__(self, tensors: dict[str, torch.Tensor], alike: set[int]) -> None:
        super().__init__(tensors)
        self._alike_ids = alike
        self._names: dict[int, str] = {}
        self.alike: set[str] = set()

    def _store(self, tensor: torch.Tensor, path: str) -> str:
        found = self._names.get(id(tensor))
        if found is not None:
            return found
        check_tensor(local_part(tensor), path)
        name = self._free_name(path)
        self._tensors[name] = tensor  # keeps it alive, so that its id stays unique
        self._names[id(tensor)] = name
        if id(tensor) in self._alike_ids:
            self.alike.add(name)
        return name


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def has_named_tensors(model: Any) -> bool:
    """Return whether a model's state is a plain module's, so that its tensors have known names."""
    return all(
        isinstance(module, nn.Module) and type(module).state_dict is nn.Module.state_dict
        for module in (model, bare(model))
    )


def bare(model: Any) -> Any:
    """Return the model without its DDP wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def module_state(model: nn.Module) -> PartState:
    """Return the state of a module without copying parameters; UsageError if it cannot be saved."""
    state = model.state_dict(keep_vars=True)
    names = canonical_names(model, state)
    tensors: dict[str, torch.Tensor] = {}
    collector = _Collector(tensors, set(map(id, _replicas(model))))
    tree = {names[key]: collector.encode(value, names[key]) for key, value in state.items()}
    return PartState(tree, tensors, frozenset(collector.alike))


def optimizer_state(model: nn.Module, optimizer: Any) -> PartState | None:
    """Return the state of a torch optimizer whose parameters are all in the model; None for others:
    with an own ``state_dict`` one rank may have all of it, as of ``ZeroRedundancyOptimizer``.
    UsageError if it contains something that cannot be saved."""
    names = parameter_names(model, optimizer)
    if names is None:
        return None
    state = optimizer.state_dict()
    parameters = numbered(optimizer, state)
    if parameters is None or not set(state["state"]) <= set(parameters):
        return None
    replicas = set(map(id, _replicas(model)))
    alike = {
        id(leaf)
        for number, held in state["state"].items()
        if id(parameters[number]) in replicas and isinstance(held, dict)
        for leaf in held.values()
    }
    named = {number: names[id(parameter)] for number, parameter in parameters.items()}
    tree = {
        **state,
        "state": {named[number]: held for number, held in state["state"].items()},
        "param_groups": [
            {**group, "params": [named[number] for number in group["params"]]}
            for group in state["param_groups"]
        ],
    }
    tensors: dict[str, torch.Tensor] = {}
    collector = _Collector(tensors, alike)
    return PartState(collector.encode(tree), tensors, frozenset(collector.alike))


def parameter_names(model: nn.Module, optimizer: Any) -> dict[int, str] | None:
    """Return names by parameter id; None unless all optimized parameters are in the model."""
    if getattr(type(optimizer), "state_dict", None) is not Optimizer.state_dict:
        return None
    state = model.state_dict(keep_vars=True)
    names: dict[int, str] = {}
    for key, name in canonical_names(model, state).items():
        names.setdefault(id(state[key]), name)
    optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return names if all(id(parameter) in names for parameter in optimized) else None


def numbered(optimizer: Any, state: Any) -> dict[int, torch.Tensor] | None:
    """Return parameters by their number in ``state``; None if it differs from torch's own form."""
    try:
        return {
            number: parameter
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
            for parameter, number in zip(group["params"], saved["params"], strict=True)
        }
    except (KeyError, TypeError, ValueError):
        return None


def _replicas(model: nn.Module) -> list[nn.Parameter]:
    """Return what DDP keeps equal on all ranks; buffers differ between two forward passes."""
    return [
        parameter
        for module in model.modules()
        if isinstance(module, DistributedDataParallel)
        for name, parameter in module.module.named_parameters()
        if name not in module.parameters_to_ignore
    ]


_COMPILED: Final = "_orig_mod"
_CHECKPOINTED: Final = "_checkpoint_wrapped_module."


def canonical_names(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Return names without the wrappers of DDP, compile and activation checkpointing, by key of the
    model's ``state_dict``. UsageError if two have the same name."""
    outer: dict[str, tuple[Any, str]] = {"": (model, "")}
    names = {}
    for key in keys:
        prefix, _, last = key.replace(_CHECKPOINTED, "").rpartition(".")
        names[key] = _within(outer, prefix)[1] + last
    if len(set(names.values())) != len(names):
        raise UsageError("two of the model's tensors have the same name without their wrappers")
    return names


def _within(known: dict[str, tuple[Any, str]], path: str) -> tuple[Any, str]:
    """Return the module at a path and its tensors' name prefix; adds them to ``known``."""
    if path not in known:
        prefix, _, part = path.rpartition(".")
        module, name = _within(known, prefix)
        wrapper = part == _COMPILED or (
            part == "module" and isinstance(module, DistributedDataParallel)
        )
        known[path] = getattr(module, part, None), name if wrapper else f"{name}{part}."
    return known[path]
