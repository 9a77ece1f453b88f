"""Nested Python state as JSON plus safetensors: no pickle, exact floats, any key type.

Tensors go to ``<name>.safetensors`` under their place in the tree, joined with dots, so that any
safetensors reader opens the file; the rest goes to ``<name>.json`` with tags for what JSON lacks.
"""

from __future__ import annotations

import base64
import errno
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from elastic_ckpt.checkpoint.disk.part import Part
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
"""Tensors are not in it; what Python makes of it takes some ten times as much."""


def write_state(part: Part, name: str, state: Any) -> None:
    """Write a tree of dicts, lists, tuples, numbers, strings, bytes, None and tensors.

    Args:
        name: the two files' path in the attempt, without their endings.

    Raises:
        UsageError: the tree holds something else; the message names the place.
        OSError: the disk said no.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = TreeEncoder(tensors).encode(state)
    header = make_header(layout_of(tensors))
    with part.open(f"{name}.safetensors", header.file_bytes) as file:
        write_file(file, header, tensors)
    part.write(f"{name}.json", dump_tree(tree, name))


def read_state(directory: Path, name: str) -> Any:
    """Read what :func:`write_state` wrote; tensors come on the CPU.

    Raises:
        CheckpointRejected: the files are not of this form.
    """
    with rejecting(f"{name} in {directory.name}"):
        tree = json.loads(read_bounded(directory / f"{name}.json", MAX_JSON_BYTES))
        return decode_tree(tree, _read_tensors(directory / f"{name}.safetensors"))


def decode_tree(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What a :class:`TreeEncoder` was given; call it within :func:`rejecting`."""
    return _decode(tree, tensors, 0)


def tensor_name(tree: Any) -> str | None:
    """The name in a tag of a tensor; None of any other tree."""
    if isinstance(tree, dict) and tree.get(_TAG) == "tensor":
        return str(tree["name"])
    return None


@contextmanager
def rejecting(what: str) -> Iterator[None]:
    """Turn all that data of a wrong form raises into one error; the disk's errors pass.

    Raises:
        CheckpointRejected: with ``what`` is not readable, and why.
    """
    try:
        yield
        return
    except ElasticCkptError:
        raise
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EFBIG):
            raise
        why = str(error.strerror)
    except Exception as error:  # what a library raises for data that nobody should give to it
        why = printable(f"{type(error).__name__}: {error}", 200)
    raise CheckpointRejected(f"{what} is not readable: {why}")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    file = TensorFile(path)
    try:
        found = {}
        for name, stored in file.tensors.items():
            found[name] = torch.empty(stored.shape, dtype=stored.dtype)
            file.read_into(stored.begin, found[name])
        return found
    finally:
        file.close()


def dump_tree(tree: Any, name: str) -> bytes:
    """A tree that a :class:`TreeEncoder` made, as the bytes of its JSON file.

    Raises:
        UsageError: it is larger than what is read back.
    """
    try:
        data = json.dumps(tree).encode()
    except ValueError as error:  # an integer of more digits than Python reads back
        raise UsageError(
            f"the state in {name} cannot be kept: {error}; it may hold tensors, arrays, numbers, "
            "texts, lists and dicts"
        ) from None
    if len(data) > MAX_JSON_BYTES:
        raise UsageError(
            f"the state in {name} has {len(data)} bytes apart from its tensors, and "
            f"{MAX_JSON_BYTES} are read: keep large lists as tensors or arrays"
        )
    return data


_SEQUENCES: Final[dict[str, type]] = {
    "tuple": tuple, "list": list, "set": set, "frozenset": frozenset,
}  # fmt: skip


class TreeEncoder:
    """Turns one tree into JSON values and puts its tensors into ``tensors``."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._seen: dict[tuple[Any, ...], str] = {}
        self._alive: list[torch.Tensor] = []  # or an address might be used twice

    def encode(self, value: Any, place: str = "", depth: int = 0) -> Any:
        """A tree as JSON values; ``place`` is where in the whole it stands.

        Raises:
            UsageError: it holds what cannot be kept.
        """
        if depth > _MAX_DEPTH:
            raise UsageError(
                f"the state at {place[:80]!r} is nested deeper than {_MAX_DEPTH}: flatten it"
            )
        match value:
            case None | bool() | str():
                return value
            case int() | float():
                # numpy's scalars are numbers too; json writes nan and inf as Python reads them
                return int(value) if isinstance(value, int) else float(value)
            case torch.Tensor():
                return {_TAG: "tensor", "name": self._store(value, place)}
            case bytes() | bytearray():
                return {_TAG: "bytes", "base64": base64.b64encode(value).decode()}
            case tuple() | list() | set() | frozenset():
                kind = next(kind for kind in _SEQUENCES if isinstance(value, _SEQUENCES[kind]))
                items = [
                    self.encode(item, f"{place}.{index}" if place else str(index), depth + 1)
                    for index, item in enumerate(value)
                ]
                return items if kind == "list" else {_TAG: kind, "items": items}
            case dict():
                return self._encode_dict(value, place, depth)
            case np.ndarray():
                return {_TAG: "ndarray", "tensor": self._encode_array(value, place)}
            case np.generic() if not isinstance(plain := value.item(), np.generic):
                return self.encode(plain, place, depth)
        raise _unsupported(value, place)

    def _encode_dict(self, value: dict[Any, Any], place: str, depth: int) -> Any:
        items = [
            (key, self.encode(item, f"{place}.{key}" if place else str(key), depth + 1))
            for key, item in value.items()
        ]
        if all(isinstance(key, str) and key != _TAG for key, _ in items) and not isinstance(
            value, Counter
        ):
            return dict(items)
        pairs = [[self.encode(key, place, depth), item] for key, item in items]
        return {_TAG: "counter" if isinstance(value, Counter) else "dict", "items": pairs}

    def _encode_array(self, value: Any, place: str) -> Any:
        try:
            tensor = torch.from_numpy(np.array(value, order="C"))
        except (TypeError, ValueError):
            raise _unsupported(value, place, f" of {value.dtype}") from None
        self._alive.append(tensor)
        return {_TAG: "tensor", "name": self._store(tensor, place)}

    def _store(self, tensor: torch.Tensor, place: str) -> str:
        """Keep a tensor once, however many names it has (tied weights)."""
        tensor = tensor.detach()
        check_tensor(tensor, place)
        identity = (
            tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(),
            tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg(),
        )  # fmt: skip
        if tensor.numel() and identity in self._seen:
            return self._seen[identity]
        name = self._free_name(place)
        self._tensors[name] = tensor
        self._seen[identity] = name
        return name

    def _free_name(self, place: str) -> str:
        name = place or "value"
        name = name.encode(errors="replace").decode()
        while name in self._tensors or name == METADATA_KEY:
            name += "_"  # a key with a dot in it may meet a nested one
        return name


def check_tensor(tensor: torch.Tensor, place: str) -> None:
    """Refuse a tensor that no safetensors file can hold.

    Raises:
        UsageError: with its place in the state.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise _unsupported(tensor, place, f" ({tensor.layout}, {tensor.device})")
    if hasattr(tensor, "__tensor_flatten__"):  # it wraps others, as a DTensor does its shard
        raise _unsupported(tensor, place)
    if tensor.dtype not in DTYPES:
        raise _unsupported(tensor, place, f" of {tensor.dtype}")


def _unsupported(value: Any, place: str, more: str = "") -> UsageError:
    return UsageError(
        f"the state at {place or 'the top'!r} is a {type(value).__name__}{more}: its state_dict "
        "may hold dicts, lists, tuples, numbers, strings, bytes, None, arrays and tensors"
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
        raise ValueError("items are no list")
    if kind in ("dict", "counter"):
        pairs = {
            _decode(key, tensors, depth): _decode(item, tensors, depth + 1)
            for key, item in tree["items"]
        }
        return Counter(pairs) if kind == "counter" else pairs
    return _SEQUENCES[kind](_decode(item, tensors, depth + 1) for item in tree["items"])
