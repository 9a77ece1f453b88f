"""Tensors of an accelerator into a file, without a pageable copy of the whole."""

from __future__ import annotations

from typing import Any, Final

import torch

_CHUNK_BYTES: Final = 32 * 1024 * 1024
_BUFFERS: Final = 2

cuda: Any = torch.cuda
"""Public, but without types."""


def write_from_device(file: Any, tensor: torch.Tensor) -> None:
    """Write a tensor's bytes in row-major order; they are in the file when this returns.

    A sink with ``take(nbytes) -> memoryview`` is filled in place: the next bytes of its mapping
    are the copy's target.
    """
    # Behind everything that the current stream still has to do with the tensor.
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    if hasattr(file, "take"):
        torch.frombuffer(file.take(flat.numel()), dtype=torch.uint8).copy_(flat)
    elif flat.is_cuda:
        _write_staged(file, flat)
    else:
        file.write(flat.cpu().numpy())


def _write_staged(file: Any, flat: torch.Tensor) -> None:
    """Through two pinned buffers: one is filled while the other is hashed and written."""
    stream = cuda.Stream(flat.device)
    stream.wait_stream(cuda.current_stream(flat.device))
    size = min(_CHUNK_BYTES, flat.numel())
    buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(_BUFFERS)]
    copied: list[Any] = [cuda.Event() for _ in range(_BUFFERS)]
    chunks = torch.split(flat, _CHUNK_BYTES)

    def begin(number: int) -> None:
        with cuda.stream(stream):
            chunk = chunks[number]
            buffers[number % _BUFFERS][: chunk.numel()].copy_(chunk, non_blocking=True)
            copied[number % _BUFFERS].record(stream)

    begin(0)
    for number, chunk in enumerate(chunks):
        if number + 1 < len(chunks):
            begin(number + 1)
        copied[number % _BUFFERS].synchronize()
        file.write(buffers[number % _BUFFERS][: chunk.numel()].numpy())
