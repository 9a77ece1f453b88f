"""What a parameter is called whatever its model is wrapped in.

The names are those of ``torch.distributed.checkpoint.state_dict`` (a test compares), which are
derived anew at each of its calls; a save asks for them at each save.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from torch.nn.parallel import DistributedDataParallel

from elastic_ckpt.errors import UsageError

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
