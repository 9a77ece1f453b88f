"""safetensors files: written from tensors in one pass, read back at an offset.

The library's own writer takes a path and leaves the hash to a second pass, and its reader maps
the file; any safetensors reader opens what is written here. Format: eight bytes of the header's
length, a JSON header, the data.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import torch

from elastic_ckpt.errors import UsageError
from elastic_ckpt.training.tensors.device_copy import DeviceCopies, is_on_device, write_from_device
from elastic_ckpt.util.files import open_regular
from elastic_ckpt.util.text import printable

DTYPES: Final[dict[torch.dtype, str]] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
"""What the format has a name for."""

NAMED_DTYPES: Final = {name: dtype for dtype, name in DTYPES.items()}

METADATA_KEY: Final = "__metadata__"
"""What the format keeps for itself among the names of a file."""

MAX_HEADER_BYTES: Final = 100_000_000
"""The library reads no larger one."""

_SMALL_BYTES: Final = 32 * 1024
"""Tensors below are joined: a call for each costs more than the copy."""


class Sink(Protocol):
    """Where the bytes go; one that maps its memory may offer ``take``, too."""

    def write(self, data: Any) -> int:
        """Append all of a buffer."""


@dataclass(frozen=True)
class Header:
    """The beginning of a file that holds certain tensors, and the order in which they follow.

    Attributes:
        data: the bytes up to the first tensor.
        order: the tensors' names.
        file_bytes: the whole file's size.
    """

    data: bytes
    order: tuple[str, ...]
    file_bytes: int


def make_header(tensors: Mapping[str, tuple[torch.dtype, Iterable[int]]]) -> Header:
    """Lay out a file.

    Args:
        tensors: dtype and shape by name; no name is ``__metadata__``, every dtype is in
            ``DTYPES``.

    Raises:
        UsageError: there are more than a reader takes.
    """
    sizes = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    # The widest first, so that each lies at a multiple of its own width; small ones together.
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
        raise UsageError(f"{len(tensors)} tensors are too many for one file")
    data = struct.pack("<Q", len(text)) + text
    return Header(data, tuple(order), len(data) + end)


def write_file(
    file: Sink,
    header: Header,
    tensors: Mapping[str, torch.Tensor],
    copies: DeviceCopies | None = None,
) -> None:
    """Write tensors of any device and layout in memory under a header that was made for them.

    The bytes are in the sink when this returns: the tensors may be changed then.

    Args:
        copies: takes the tensors of a device, if the sink maps its memory: their bytes are in the
            sink when it is finished.
    """
    file.write(header.data)
    small: list[torch.Tensor] = []
    for name in header.order:
        tensor = tensors[name].detach()
        if not tensor.numel():
            continue
        far = is_on_device(tensor)
        if not far and tensor.nbytes < _SMALL_BYTES:
            small.append(_flat_bytes(tensor))
            continue
        _write_joined(file, small)
        small.clear()
        if not far:
            file.write(_memory(_flat_bytes(tensor)))
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
    """What :func:`make_header` asks for."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor's memory, in row-major order; copied only if it lies otherwise."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor.contiguous().view(-1).view(torch.uint8)


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
class Stored:
    """Where a tensor lies in its file; ``begin`` is counted in bytes from the file's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


class TensorFile:
    """An open safetensors file. What it says of itself is checked against its size.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be opened, or is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._fd = open_regular(path)  # the library would follow a link, and wait for a FIFO
        try:
            self.tensors = self._read_header()
        except (struct.error, KeyError, msgspec.MsgspecError) as error:
            self.close()
            raise ValueError(f"{path.name} has no header: {printable(str(error), 200)}") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def read_into(self, begin: int, target: torch.Tensor) -> None:
        """Fill a contiguous CPU tensor with the bytes from ``begin`` on.

        Raises:
            ValueError: the file has become shorter.
            OSError: the disk said no.
        """
        if not target.numel():
            return
        view = _memory(target.detach().view(-1).view(torch.uint8))
        while view:
            count = os.preadv(self._fd, [view], begin)
            if not count:
                raise ValueError(f"{self._name} ends before its tensors do")
            view, begin = view[count:], begin + count

    def _read_header(self) -> dict[str, Stored]:
        size = os.fstat(self._fd).st_size
        (length,) = struct.unpack("<Q", os.pread(self._fd, 8, 0))
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError("its header is longer than the file, or than any header")
        raw = _HeaderDecoder.decode(os.pread(self._fd, length, 8))
        raw.pop(METADATA_KEY, None)
        start = 8 + length
        return {name: _stored(_EntryDecoder.decode(raw[name]), start, size) for name in raw}


def _stored(entry: _Entry, start: int, size: int) -> Stored:
    dtype = NAMED_DTYPES[entry.dtype]
    begin, end = entry.data_offsets
    if min((begin, *entry.shape)) < 0 or start + end > size:
        raise ValueError("a tensor lies outside of the file")
    if end - begin != prod(entry.shape) * dtype.itemsize:
        raise ValueError("a tensor's size is not that of its shape")
    return Stored(dtype, tuple(entry.shape), start + begin)
