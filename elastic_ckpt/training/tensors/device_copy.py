"""Copies an accelerator's tensors to a file, without a pageable copy of the whole.

Synchronously, or with :class:`DeviceCopies` while the caller continues to compute.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any, Final, Protocol

import torch

_CHUNK_BYTES: Final = 32 * 1024 * 1024
_BUFFERS: Final = 2

cuda: Any = torch.cuda
"""Public, but untyped."""


def is_on_device(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is not in this process's memory."""
    return not tensor.is_cpu


def write_from_device(file: Any, tensor: torch.Tensor) -> None:
    """Write a tensor's bytes in row-major order; they are in the file when this returns. A sink
    with ``take(nbytes) -> memoryview`` is filled in place."""
    # Ordered after the current stream's pending work on the tensor.
    flat = flat_bytes(tensor)
    if hasattr(file, "take"):
        torch.frombuffer(file.take(flat.numel()), dtype=torch.uint8).copy_(flat)
    elif flat.is_cuda:
        _write_staged(file, flat)
    else:
        file.write(flat.cpu().numpy())


class Lane(Protocol):
    """A queue of work on a device, parallel to the caller's."""

    def follow(self) -> None:
        """Start further work after everything that the caller has queued so far."""

    def run(self, act: Callable[[], None]) -> None:
        """Queue work, without waiting for it."""

    def hold_back(self) -> None:
        """Start what the caller queues from now on after all of this lane's work."""

    def wait(self) -> None:
        """Wait until all work is done."""


class CudaLane:
    """A CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = cuda.Stream(device)

    def follow(self) -> None:
        self._stream.wait_stream(cuda.current_stream(self._device))

    def run(self, act: Callable[[], None]) -> None:
        with cuda.stream(self._stream):
            act()

    def hold_back(self) -> None:
        cuda.current_stream(self._device).wait_stream(self._stream)

    def wait(self) -> None:
        self._stream.synchronize()


class DeviceCopies:
    """Copies tensors into mapped memory while the caller computes.

    What the caller's work modifies before :meth:`guard` may be too early for a copy. So a sum of
    each tensor is computed before the caller continues and again after its copy. They differ if
    the tensor was modified in between, and :meth:`finish` returns that.
    """

    def __init__(self, lane: Callable[[torch.device], Lane] = CudaLane) -> None:
        self._make_lane = lane
        self._lanes: dict[torch.device, Lane] = {}
        self._sources: list[torch.Tensor] = []  # kept until their copies are done
        self._sums: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, space: memoryview, tensor: torch.Tensor) -> None:
        """Start to copy a tensor's bytes, in row-major order, to memory of that size."""
        source = flat_bytes(tensor)
        if source.device not in self._lanes:
            self._lanes[source.device] = self._make_lane(source.device)
        lane = self._lanes[source.device]
        before = _sum(source)
        lane.follow()

        def copy() -> None:
            torch.frombuffer(space, dtype=torch.uint8).copy_(source, non_blocking=True)
            self._sums.append((before, _sum(source)))

        lane.run(copy)
        self._sources.append(source)

    def guard(self) -> None:
        """Let the caller's further work modify the tensors. Does not wait."""
        for lane in self._lanes.values():
            lane.hold_back()

    def finish(self) -> bool:
        """Wait for all copies; return whether no tensor was modified since its :meth:`add`."""
        for lane in self._lanes.values():
            lane.wait()
        unchanged = all(bool(torch.equal(before, after)) for before, after in self._sums)
        self._sources.clear()
        self._sums.clear()
        return unchanged


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes in row-major order, copied only if they are not."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _sum(flat: torch.Tensor) -> torch.Tensor:
    """Return the sum of the bytes, or of the words if aligned; it cannot overflow."""
    whole = flat.numel() % 4 == 0 and flat.storage_offset() % 4 == 0
    return (flat.view(torch.int32) if whole else flat).sum(dtype=torch.int64)


def _write_staged(file: Any, flat: torch.Tensor) -> None:
    """Write through two pinned buffers: one is filled while the other is written."""
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


def pin(mapping: mmap.mmap) -> None:
    """Register a mapping with CUDA, if this process uses it already. If that fails, a copy into the
    mapping is still correct, but synchronous."""
    if cuda.is_initialized():
        cuda.cudart().cudaHostRegister(_address(mapping), len(mapping), 0)


def unpin(mapping: mmap.mmap) -> None:
    """Unregister a mapping, before its pages are unmapped."""
    if cuda.is_initialized() and torch.frombuffer(mapping, dtype=torch.uint8).is_pinned():
        cuda.cudart().cudaHostUnregister(_address(mapping))


def _address(mapping: mmap.mmap) -> int:
    return torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
