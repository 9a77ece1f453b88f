"""Nested Python state as JSON plus safetensors: no pickle, exact floats, any key type.

Tensors go to ``<name>.safetensors``, named by their dotted path in the tree, so that any
safetensors reader opens the file. The rest goes to ``<name>.json``, with tags for what JSON lacks.
"""

from __future__ import annotations

import base64
import errno
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from elastic_ckpt.checkpoint.tier import Part
from elastic_ckpt.errors import CheckpointRejected, ElasticCkptError, UsageError
from elastic_ckpt.training.tensors.safetensors_file import (
    DTYPES,
    METADATA_KEY,
    TensorFile,
    layout_of,
    make_header,
    write_file,
)
from elastic_ckpt.util.files import read_bounded
from elastic_ckpt.util.text import printable

_TAG: Final = "$"
_MAX_DEPTH: Final = 64
MAX_JSON_BYTES: Final = 256 * 1024 * 1024
"""Without the tensors; Python needs about ten times as much memory for it."""


def write_state(part: Part, name: str, state: Any) -> None:
    """Write a tree of dicts, lists, tuples, numbers, strings, bytes, None and tensors to two files,
    which are ``name`` with an extension. UsageError, with its path, for anything else."""
    tensors: dict[str, torch.Tensor] = {}
    tree = TreeEncoder(tensors).encode(state)
    header = make_header(layout_of(tensors))
    with part.open(f"{name}.safetensors", header.file_bytes) as file:
        write_file(file, header, tensors)
    part.write(f"{name}.json", dump_tree(tree, name))


def read_state(directory: Path, name: str) -> Any:
    """Read what :func:`write_state` wrote, with tensors on the CPU, or raise CheckpointRejected."""
    with rejecting(f"{name} in {directory.name}"):
        tree = json.loads(read_bounded(directory / f"{name}.json", MAX_JSON_BYTES))
        return decode_tree(tree, _read_tensors(directory / f"{name}.safetensors"))


def decode_tree(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Decode a tree of :class:`TreeEncoder`; call it within :func:`rejecting`."""
    return _decode(tree, tensors, 0)


def tensor_name(tree: Any) -> str | None:
    """Return the name in a tensor's tag; None for any other tree."""
    if isinstance(tree, dict) and tree.get(_TAG) == "tensor":
        return str(tree["name"])
    return None


@contextmanager
def rejecting(what: str) -> Iterator[None]:
    """Turn whatever invalid data raises into CheckpointRejected: "``what`` is not readable", and
    why. Storage errors pass through."""
    try:
        yield
        return
    except ElasticCkptError:
        raise
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EFBIG):
            raise
        why = str(error.strerror)
    except Exception as error:  # libraries raise anything for invalid data
        why = printable(f"{type(error).__name__}: {error}", 200)
    raise CheckpointRejected(f"{what} is not readable: {why}")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    with closing(TensorFile(path)) as file:
        for name, stored in file.tensors.items():
            found[name] = torch.empty(stored.shape, dtype=stored.dtype)
            file.read_into(stored.begin, found[name])
    return found


def dump_tree(tree: Any, name: str) -> bytes:
    """Encode a tree of :class:`TreeEncoder` as its JSON file; UsageError if it is too large."""
    try:
        data = json.dumps(tree).encode()
    except ValueError as error:  # an integer with more digits than Python reads
        raise UsageError(
            f"cannot save the state in {name}: {error}; it may contain tensors, arrays, numbers, "
            "strings, lists and dicts"
        ) from None
    if len(data) > MAX_JSON_BYTES:
        raise UsageError(
            f"the state in {name} has {len(data)} bytes without its tensors, and the maximum is "
            f"{MAX_JSON_BYTES}: store large lists as tensors or arrays"
        )
    return data


_SEQUENCES: Final[dict[str, type]] = {
    "tuple": tuple, "list": list, "set": set, "frozenset": frozenset,
}  # fmt: skip


class TreeEncoder:
    """Turns one tree into JSON values, and collects its tensors in ``tensors``."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._seen: dict[tuple[Any, ...], str] = {}
        self._alive: list[torch.Tensor] = []  # or an address might be reused

    def encode(self, value: Any, path: str = "", depth: int = 0) -> Any:
        """Return a tree as JSON values; ``path`` is its position in the whole tree. UsageError if
        it contains something that cannot be saved."""
        if depth > _MAX_DEPTH:
            raise UsageError(
                f"the state at {path[:80]!r} is nested deeper than {_MAX_DEPTH}: flatten it"
            )
        match value:
            case None | bool() | str():
                return value
            case int() | float():
                # NumPy's scalars are numbers too; json reads back the nan and inf that it writes
                return int(value) if isinstance(value, int) else float(value)
            case torch.Tensor():
                return {_TAG: "tensor", "name": self._store(value, path)}
            case bytes() | bytearray():
                return {_TAG: "bytes", "base64": base64.b64encode(value).decode()}
            case tuple() | list() | set() | frozenset():
                kind = next(kind for kind in _SEQUENCES if isinstance(value, _SEQUENCES[kind]))
                items = [
                    self.encode(item, f"{path}.{index}" if path else str(index), depth + 1)
                    for index, item in enumerate(value)
                ]
                return items if kind == "list" else {_TAG: kind, "items": items}
            case dict():
                return self._encode_dict(value, path, depth)
            case np.ndarray():
                return {_TAG: "ndarray", "tensor": self._encode_array(value, path)}
            case np.generic() if not isinstance(plain := value.item(), np.generic):
                return self.encode(plain, path, depth)
        raise _unsupported(value, path)

    def _encode_dict(self, value: dict[Any, Any], path: str, depth: int) -> Any:
        items = [
            (key, self.encode(item, f"{path}.{key}" if path else str(key), depth + 1))
            for key, item in value.items()
        ]
        if all(isinstance(key, str) and key != _TAG for key, _ in items) and not isinstance(
            value, Counter
        ):
            return dict(items)
        pairs = [[self.encode(key, path, depth), item] for key, item in items]
        return {_TAG: "counter" if isinstance(value, Counter) else "dict", "items": pairs}

    def _encode_array(self, value: Any, path: str) -> Any:
        try:
            tensor = torch.from_numpy(np.array(value, order="C"))
        except (TypeError, ValueError):
            raise _unsupported(value, path, f" of {value.dtype}") from None
        self._alive.append(tensor)
        return {_TAG: "tensor", "name": self._store(tensor, path)}

    def _store(self, tensor: torch.Tensor, path: str) -> str:
        """Collect a tensor once, however many names it has (tied weights)."""
        tensor = tensor.detach()
        check_tensor(tensor, path)
        identity = (
            tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(),
            tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg(),
        )  # fmt: skip
        if tensor.numel() and identity in self._seen:
            return self._seen[identity]
        name = self._free_name(path)
        self._tensors[name] = tensor
        self._seen[identity] = name
        return name

    def _free_name(self, path: str) -> str:
        name = path or "value"
        name = name.encode(errors="replace").decode()
        while name in self._tensors or name == METADATA_KEY:
            name += "_"  # a key that contains a dot may collide with a nested one
        return name


def check_tensor(tensor: torch.Tensor, path: str) -> None:
    """Raise UsageError, with the path in the state, for a tensor that safetensors cannot store."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise _unsupported(tensor, path, f" ({tensor.layout}, {tensor.device})")
    if hasattr(tensor, "__tensor_flatten__"):  # it wraps other tensors, as a DTensor its shard
        raise _unsupported(tensor, path)
    if tensor.dtype not in DTYPES:
        raise _unsupported(tensor, path, f" of {tensor.dtype}")


def _unsupported(value: Any, path: str, more: str = "") -> UsageError:
    return UsageError(
        f"the state at {path or 'the top'!r} is a {type(value).__name__}{more}: its state_dict "
        "may contain dicts, lists, tuples, numbers, strings, bytes, None, arrays and tensors"
    )


def _decode(tree: Any, tensors: Mapping[str, torch.Tensor], depth: int) -> Any:
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
        return tensors[tree["tensor"]["name"]].numpy()
    if kind == "bytes":
        return base64.b64decode(tree["base64"], validate=True)
    if not isinstance(tree["items"], list):
        raise ValueError("items are not a list")
    if kind in ("dict", "counter"):
        pairs = {
            _decode(key, tensors, depth): _decode(item, tensors, depth + 1)
            for key, item in tree["items"]
        }
        return Counter(pairs) if kind == "counter" else pairs
    return _SEQUENCES[kind](_decode(item, tensors, depth + 1) for item in tree["items"])
