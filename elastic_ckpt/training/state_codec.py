"""Nested Python state as JSON plus safetensors: no pickle, exact floats, any key type.

Tensors go to ``<name>.safetensors`` under their place in the tree, joined with dots, so that any
safetensors reader opens the file; the rest goes to ``<name>.json`` with tags for what JSON lacks.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from elastic_ckpt.errors import CheckpointRejected, UsageError

_TAG: Final = "$"
_MAX_DEPTH: Final = 64


def write_state(directory: Path, name: str, state: Any) -> list[str]:
    """Write a tree of dicts, lists, tuples, numbers, strings, bytes, None and tensors.

    Returns:
        The names of the two files.

    Raises:
        UsageError: the tree holds something else; the message names the place.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    tree = _encode(state, "", tensors, seen)
    save_file(tensors, directory / f"{name}.safetensors", metadata={"format": "pt"})
    (directory / f"{name}.json").write_text(json.dumps(tree))
    return [f"{name}.json", f"{name}.safetensors"]


def read_state(directory: Path, name: str) -> Any:
    """Read what :func:`write_state` wrote; tensors come on the CPU.

    Raises:
        CheckpointRejected: the files are not of this form.
    """
    try:
        tree = json.loads((directory / f"{name}.json").read_text())
        tensors = load_file(directory / f"{name}.safetensors")
        return _decode(tree, tensors, 0)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointRejected(f"{name} in {directory.name} is not readable: {error}") from None


def _encode(
    value: Any, place: str, tensors: dict[str, torch.Tensor], seen: dict[tuple[Any, ...], str]
) -> Any:
    match value:
        case None | bool() | str():
            return value
        case int() | float():
            # numpy's scalars are numbers too; json writes nan and inf as Python reads them
            return int(value) if isinstance(value, int) else float(value)
        case torch.Tensor():
            return {_TAG: "tensor", "name": _store(value, place, tensors, seen)}
        case bytes() | bytearray():
            return {_TAG: "bytes", "base64": base64.b64encode(value).decode()}
        case tuple() | list() | set() | frozenset():
            kind = next(kind for kind in _SEQUENCES if isinstance(value, _SEQUENCES[kind]))
            items = [
                _encode(item, f"{place}.{index}" if place else str(index), tensors, seen)
                for index, item in enumerate(value)
            ]
            return items if kind == "list" else {_TAG: kind, "items": items}
        case dict():
            return _encode_dict(value, place, tensors, seen)
    if type(value).__module__ == "numpy" and hasattr(value, "item") and not value.shape:
        return _encode(value.item(), place, tensors, seen)
    if type(value).__module__ == "numpy" and hasattr(value, "__array__"):
        encoded = _encode(torch.from_numpy(value), place, tensors, seen)
        return {_TAG: "ndarray", "tensor": encoded}
    raise UsageError(
        f"the state at {place or 'the top'!r} is a {type(value).__name__}: its state_dict may "
        "hold dicts, lists, tuples, numbers, strings, bytes, None, arrays and tensors"
    )


_SEQUENCES: Final[dict[str, type]] = {
    "tuple": tuple, "list": list, "set": set, "frozenset": frozenset,
}  # fmt: skip


def _encode_dict(
    value: dict[Any, Any],
    place: str,
    tensors: dict[str, torch.Tensor],
    seen: dict[tuple[Any, ...], str],
) -> Any:
    items = [
        (key, _encode(item, f"{place}.{key}" if place else str(key), tensors, seen))
        for key, item in value.items()
    ]
    if all(isinstance(key, str) and key != _TAG for key, _ in items) and not isinstance(
        value, Counter
    ):
        return dict(items)
    pairs = [[_encode(key, place, tensors, seen), item] for key, item in items]
    return {_TAG: "counter" if isinstance(value, Counter) else "dict", "items": pairs}


def _store(
    tensor: torch.Tensor,
    place: str,
    tensors: dict[str, torch.Tensor],
    seen: dict[tuple[Any, ...], str],
) -> str:
    """Keep a tensor once, however many names it has (tied weights)."""
    tensor = tensor.detach()
    identity = (
        tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(),
        tensor.dtype,
    )  # fmt: skip
    if tensor.numel() and identity in seen:
        return seen[identity]
    name = place or "value"
    while name in tensors:  # a key with a dot in it may meet a nested one
        name += "_"
    # safetensors refuses tensors that share memory: a view is written as a copy of its own
    shares = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    tensors[name] = tensor.clone().contiguous() if shares else tensor.contiguous()
    seen[identity] = name
    return name


def _decode(tree: Any, tensors: dict[str, torch.Tensor], depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(tree, list):
        return [_decode(item, tensors, depth + 1) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get(_TAG)
    if kind is None:
        return {key: _decode(item, tensors, depth + 1) for key, item in tree.items()}
    if kind == "tensor":
        return tensors[tree["name"]]
    if kind == "ndarray":
        return _decode(tree["tensor"], tensors, depth + 1).numpy()
    if kind == "bytes":
        return base64.b64decode(tree["base64"])
    items = _decode(tree["items"], tensors, depth + 1)
    if kind in ("dict", "counter"):
        pairs = {(tuple(key) if isinstance(key, list) else key): item for key, item in items}
        return Counter(pairs) if kind == "counter" else pairs
    return _SEQUENCES[kind](items)
