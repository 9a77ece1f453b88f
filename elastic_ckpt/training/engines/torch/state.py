"""The state of a module and of its optimizer: a tree without tensors, and tensors by name.

Parameters have the names that they have in the bare model, in the optimizer's state, too, so that
what one kind of parallelism wrote, another one reads. torch's own ``get_optimizer_state_dict`` is
not called: it makes a step if the optimizer has made none, which changes the training.
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
        tree: JSON values; tensors stand in it as tags with their names. A module's is an object
            of names, each with a tree of its own.
        tensors: by name; a DTensor stands for this rank's shard.
        alike: names of tensors that every rank holds with the same contents, so that any of them
            may write it. Of what is neither in here nor a DTensor, rank 0's counts.
    """

    tree: Any
    tensors: dict[str, torch.Tensor]
    alike: frozenset[str]


class _Collector(TreeEncoder):
    """Leaves tensors as they are; one that is there twice is kept once."""

    def __init__(self, tensors: dict[str, torch.Tensor], alike: set[int]) -> None:
        super().__init__(tensors)
        self._alike_ids = alike
        self._names: dict[int, str] = {}
        self.alike: set[str] = set()

    def _store(self, tensor: torch.Tensor, place: str) -> str:
        found = self._names.get(id(tensor))
        if found is not None:
            return found
        check_tensor(local_part(tensor), place)
        name = self._free_name(place)
        self._tensors[name] = tensor  # keeps it alive, and so its id its own
        self._names[id(tensor)] = name
        if id(tensor) in self._alike_ids:
            self.alike.add(name)
        return name


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def can_be_shared_out(model: Any) -> bool:
    """Whether a model's state is that of a plain module, so that its tensors have known names."""
    return all(
        isinstance(module, nn.Module) and type(module).state_dict is nn.Module.state_dict
        for module in (model, bare(model))
    )


def bare(model: Any) -> Any:
    """The model without DDP around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def module_state(model: nn.Module) -> PartState:
    """The state of a module; parameters as they are, without a copy.

    Raises:
        UsageError: it holds what cannot be kept.
    """
    state = model.state_dict(keep_vars=True)
    names = canonical_names(model, state)
    tensors: dict[str, torch.Tensor] = {}
    collector = _Collector(tensors, set(map(id, _replicas(model))))
    tree = {names[key]: collector.encode(value, names[key]) for key, value in state.items()}
    return PartState(tree, tensors, frozenset(collector.alike))


def optimizer_state(model: nn.Module, optimizer: Any) -> PartState | None:
    """The state of a torch optimizer whose parameters are all in the model; None of any other.

    One with a ``state_dict`` of its own may have all of it on one rank only, as
    ``ZeroRedundancyOptimizer`` does.

    Raises:
        UsageError: it holds what cannot be kept.
    """
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
    """Names by the id of each parameter; None unless the model has all that are optimized."""
    if getattr(type(optimizer), "state_dict", None) is not Optimizer.state_dict:
        return None
    state = model.state_dict(keep_vars=True)
    names: dict[int, str] = {}
    for key, name in canonical_names(model, state).items():
        names.setdefault(id(state[key]), name)
    optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return names if all(id(parameter) in names for parameter in optimized) else None


def numbered(optimizer: Any, state: Any) -> dict[int, torch.Tensor] | None:
    """Parameters by their number in ``state``; None if it has not the form of torch's own."""
    try:
        return {
            number: parameter
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
            for parameter, number in zip(group["params"], saved["params"], strict=True)
        }
    except (KeyError, TypeError, ValueError):
        return None


def _replicas(model: nn.Module) -> list[nn.Parameter]:
    """What DDP keeps equal on all ranks. Buffers differ between two forward passes."""
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
    """The name without DDP's, torch.compile's and activation checkpointing's wrappers, by key.

    Args:
        keys: of the model's ``state_dict``.

    Raises:
        UsageError: two keys would have one name.
    """
    outer: dict[str, tuple[Any, str]] = {"": (model, "")}
    names = {}
    for key in keys:
        prefix, _, last = key.replace(_CHECKPOINTED, "").rpartition(".")
        names[key] = _within(outer, prefix)[1] + last
    if len(set(names.values())) != len(names):
        raise UsageError("two of the model's tensors have the same name without their wrappers")
    return names


def _within(known: dict[str, tuple[Any, str]], path: str) -> tuple[Any, str]:
    """The module at a path, and what the names of its tensors begin with; ``known`` grows."""
    if path not in known:
        prefix, _, part = path.rpartition(".")
        module, name = _within(known, prefix)
        wrapper = part == _COMPILED or (
            part == "module" and isinstance(module, DistributedDataParallel)
        )
        known[path] = getattr(module, part, None), name if wrapper else f"{name}{part}."
    return known[path]
