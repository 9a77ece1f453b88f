"""safetensors files: written from tensors in one pass, read back at an offset.

The library's own writer takes a path and requires a second pass for the hash, and its reader maps
the file. Any safetensors reader opens what is written here. Format: the header's length in eight
bytes, a JSON header, the data.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from elastic_ckpt.checkpoint.tier import Sink
from elastic_ckpt.errors import UsageError
from elastic_ckpt.training.tensors.device_copy import (
    DeviceCopies,
    flat_bytes,
    is_on_device,
    write_from_device,
)
from elastic_ckpt.util.files import open_regular
from elastic_ckpt.util.text import printable

DTYPES: Final[dict[torch.dtype, str]] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
"""The format's names of dtypes."""

NAMED_DTYPES: Final = {name: dtype for dtype, name in DTYPES.items()}

METADATA_KEY: Final = "__metadata__"
"""The name that the format reserves."""

MAX_HEADER_BYTES: Final = 100_000_000
"""The maximum that the library reads."""

_SMALL_BYTES: Final = 32 * 1024
"""Smaller tensors are joined: a call for each costs more than the copy."""


@dataclass(frozen=True)
class Header:
    """The bytes of a file before the first tensor, the names of the tensors in order, and the size
    of the whole file."""

    data: bytes
    order: tuple[str, ...]
    file_bytes: int


def make_header(tensors: Mapping[str, tuple[torch.dtype, Iterable[int]]]) -> Header:
    """Lay out a file of tensors by name, with dtypes of ``DTYPES``; no name is ``__metadata__``.
    UsageError if there are more tensors than a reader accepts."""
    sizes = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    # The widest first, so that each is aligned to its width; then by size, to join small ones.
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, -sizes[name], name))
    header: dict[str, Any] = {METADATA_KEY: {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        begin, end = end, end + sizes[name]
        header[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise UsageError(f"{len(tensors)} tensors are too many for one safetensors file")
    data = struct.pack("<Q", len(text)) + text
    return Header(data, tuple(order), len(data) + end)


def write_file(
    file: Sink,
    header: Header,
    tensors: Mapping[str, torch.Tensor],
    copies: DeviceCopies | None = None,
) -> None:
    """Write tensors of any device and layout after the header that was made for them. Their bytes
    are in the sink when this returns; a device's once ``copies`` has finished, if the sink maps its
    memory."""
    file.write(header.data)
    small: list[torch.Tensor] = []
    for name in header.order:
        tensor = tensors[name].detach()
        if not tensor.numel():
            continue
        far = is_on_device(tensor)
        if not far and tensor.nbytes < _SMALL_BYTES:
            small.append(flat_bytes(tensor))
            continue
        _write_joined(file, small)
        small.clear()
        if not far:
            file.write(_memory(flat_bytes(tensor)))
        elif copies is not None and hasattr(file, "take"):
            copies.add(file.take(tensor.nbytes), tensor)
        else:
            write_from_device(file, tensor)
    _write_joined(file, small)


def _write_joined(file: Sink, small: list[torch.Tensor]) -> None:
    if not small:
        return
    if hasattr(file, "take"):
        space = file.take(sum(one.numel() for one in small))
        torch.cat(small, out=torch.frombuffer(space, dtype=torch.uint8))
    else:
        file.write(_memory(torch.cat(small)))


def layout_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Return the arguments of :func:`make_header`."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _memory(flat: torch.Tensor) -> memoryview:
    array: Any = flat.numpy()
    return memoryview(array)


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_HeaderDecoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_EntryDecoder = msgspec.json.Decoder(_Entry)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in its file; ``begin`` is its offset from the start of the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


def first_tensor_at(path: Path) -> int:
    """Return where in a file its header ends, as its first bytes say; OSError as ``TensorFile``."""
    with open(open_regular(path), "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


class TensorFile:
    """An open safetensors file, whose header is checked against its size. ValueError if it is
    invalid, OSError if it cannot be opened or is not a regular file."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._fd = open_regular(path)  # the library would follow a link or block on a FIFO
        try:
            self.tensors = self._read_header()
        except (struct.error, KeyError, msgspec.MsgspecError) as error:
            self.close()
            raise ValueError(
                f"{path.name} has no valid header: {printable(str(error), 200)}"
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def read_into(self, begin: int, target: torch.Tensor) -> None:
        """Fill a contiguous CPU tensor with the bytes from ``begin`` on. ValueError if the file was
        truncated, OSError if reading failed."""
        if not target.numel():
            return
        view = _memory(target.detach().view(-1).view(torch.uint8))
        while view:
            count = os.preadv(self._fd, [view], begin)
            if not count:
                raise ValueError(f"{self._name} ends before its tensors do")
            view, begin = view[count:], begin + count

    def _read_header(self) -> dict[str, StoredTensor]:
        size = os.fstat(self._fd).st_size
        (length,) = struct.unpack("<Q", os.pread(self._fd, 8, 0))
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError("its header is longer than the file or the maximum")
        raw = _HeaderDecoder.decode(os.pread(self._fd, length, 8))
        raw.pop(METADATA_KEY, None)
        start = 8 + length
        return {name: _stored(_EntryDecoder.decode(raw[name]), start, size) for name in raw}


def _stored(entry: _Entry, start: int, size: int) -> StoredTensor:
    dtype = NAMED_DTYPES[entry.dtype]
    begin, end = entry.data_offsets
    if min((begin, *entry.shape)) < 0 or start + end > size:
        raise ValueError("a tensor lies outside the file")
    if end - begin != prod(entry.shape) * dtype.itemsize:
        raise ValueError("a tensor's size does not match its shape")
    return StoredTensor(dtype, tuple(entry.shape), start + begin)
