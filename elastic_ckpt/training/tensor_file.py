"""Tensors to a safetensors file, one after the other, hashed on the way.

The library's own writer takes a path and leaves the hash to a second pass; any safetensors reader
opens what is written here. Format: eight bytes of the header's length, a JSON header, the data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, Final

import torch

from elastic_ckpt.store.part import Sink

DTYPES: Final[dict[torch.dtype, str]] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
"""What the format has a name for."""

METADATA_KEY: Final = "__metadata__"
"""What the format keeps for itself among the names of a file."""


def write_tensors(file: Sink, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write dense, contiguous tensors of any device; one at a time is copied to the CPU.

    Args:
        tensors: by name; no name is ``__metadata__``, every dtype is in ``DTYPES``.
    """
    # The widest first, so that each lies at a multiple of its own width.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {METADATA_KEY: {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        if tensors[name].numel():
            flat = tensors[name].cpu().reshape(-1).view(torch.uint8)
            file.write(flat.numpy())
