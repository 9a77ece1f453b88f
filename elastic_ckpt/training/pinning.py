"""Pages of the memory tier that a CUDA device copies into by itself, beside its computation."""

from __future__ import annotations

import mmap
from typing import Any

import torch

cuda: Any = torch.cuda
"""Public, but without types."""


def pin(mapping: mmap.mmap) -> None:
    """Register a mapping with CUDA, if this process uses it by now.

    Where that is refused a copy into the mapping is still right, and the caller waits for it.
    """
    if cuda.is_initialized():
        cuda.cudart().cudaHostRegister(_address(mapping), len(mapping), 0)


def unpin(mapping: mmap.mmap) -> None:
    """Take it back, before the pages are unmapped."""
    if cuda.is_initialized() and torch.frombuffer(mapping, dtype=torch.uint8).is_pinned():
        cuda.cudart().cudaHostUnregister(_address(mapping))


def _address(mapping: mmap.mmap) -> int:
    return torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
