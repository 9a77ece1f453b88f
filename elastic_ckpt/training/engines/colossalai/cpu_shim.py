"""ColossalAI without a GPU, to test and try out scripts, not to train.

Its CPU accelerator rejects most calls, and some of its modules require a CUDA device without using
it. All replacements are here, do nothing if there is a CUDA device, and a test checks of each piece
that it is still needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from colossalai.accelerator import get_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from torch import distributed

_cpu: Any = CpuAccelerator
_torch: Any = torch
_distributed: Any = distributed
"""Untyped: the patches below do not fit the types."""


class _NoStream:
    """A stream of a CPU, on which everything is done when a call returns."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def patch_loads() -> None:
    """Let an optimizer's state be loaded: ``synchronize`` raises although it has nothing to do."""
    if not torch.cuda.is_available():
        _cpu.synchronize = lambda self, device=None: None


def patch_training(leave_out: str = "") -> None:
    """Let the plugins other than TorchDDP train. Call it before ``Booster.boost``; may be repeated.
    A test leaves out one of ``PIECES``, to see whether it is still needed."""
    if torch.cuda.is_available():
        return
    patch_loads()
    for name, patch in PIECES.items():
        if name != leave_out:
            patch()


def _streams() -> None:
    """Provide the streams with which LowLevelZero and Gemini overlap communication."""
    _cpu.Stream = lambda self, *args, **options: _NoStream()
    _cpu.current_stream = lambda self, device=None: _NoStream()
    _cpu.default_stream = lambda self, device=None: _NoStream()
    _cpu.stream = lambda self, stream: contextlib.nullcontext()


def _device() -> None:
    """Provide the current device, which pipeline stages, loss scales and random states use."""
    _cpu.current_device = lambda self: "cpu"
    _cpu.device_count = lambda self: 1


def _random_states() -> None:
    """Provide the random states that tensor parallelism keeps per rank."""
    _cpu.manual_seed = lambda self, seed: (torch.manual_seed(seed), None)[1]
    _cpu.get_rng_state = lambda self, device=None: torch.get_rng_state()


def _zero_device_check() -> None:
    """Pretend to have a device while ZeRO's optimizer asserts that there is one."""
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    plain = LowLevelZeroOptimizer._sanity_checks
    if getattr(plain, "patched", False):
        return

    def check(self: Any) -> None:
        accelerator = get_accelerator()
        name, accelerator._name = accelerator._name, "cuda"
        try:
            plain(self)
        finally:
            accelerator._name = name

    check.__dict__["patched"] = True
    LowLevelZeroOptimizer._sanity_checks = check


def _record_stream() -> None:
    """Accept that ZeRO marks tensors as in use by a stream, which CPU tensors do not support."""
    _torch.Tensor.record_stream = lambda self, stream: None


def _cuda_calls() -> None:
    """Accept direct calls of CUDA by TorchFSDP, MoE and some layers of tensor parallelism."""
    _torch.Tensor.cuda = lambda self, *args, **options: self
    _torch.cuda.set_device = lambda device: None
    _torch.cuda.current_device = lambda: torch.device("cpu")


def _adam_kernel() -> None:
    """Skip the kernel that Gemini's optimizers compile, and do not call in bf16."""
    from colossalai.kernel.kernel_loader import CPUAdamLoader

    CPUAdamLoader.load = lambda self, ext_name=None: _NoKernel


class _NoKernel:
    def CPUAdamOptimizer(*args: Any) -> None:
        """Return None, which fails if it is called."""


def _fsdp_host_copies() -> None:
    """Keep FSDP from freeing parameters after a copy to the host, where they already are."""
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    handle: Any = FlatParamHandle
    handle.to_cpu = lambda self: contextlib.nullcontext()


def _gemini_chunks() -> None:
    """Treat all memory as the device's, which Gemini tells from the host's by name."""
    from colossalai.zero.gemini.chunk import Chunk

    plain = Chunk.close_chunk
    if getattr(plain, "patched", False):
        return

    def close_chunk(self: Any) -> None:
        plain(self)
        if self.cpu_shard is not None:
            self.cuda_shard, self.cpu_shard = self.cpu_shard, None

    close_chunk.__dict__["patched"] = True
    Chunk.close_chunk = close_chunk
    Chunk.device_type = property(lambda self: "cuda")
    Chunk.shard_move = lambda self, *args, **options: None


def _huawei_backend() -> None:
    """Define Huawei's backend, which pipeline stages check for and only its torch builds have."""
    if not hasattr(distributed, "is_hccl_available"):
        _distributed.is_hccl_available = lambda: False
    if not hasattr(distributed.Backend, "HCCL"):
        _distributed.Backend.HCCL = "hccl"


PIECES: dict[str, Callable[[], None]] = {
    "streams": _streams,
    "device": _device,
    "random states": _random_states,
    "ZeRO's device check": _zero_device_check,
    "record_stream": _record_stream,
    "calls of CUDA": _cuda_calls,
    "Adam's kernel": _adam_kernel,
    "FSDP's copies to the host": _fsdp_host_copies,
    "Gemini's chunks": _gemini_chunks,
    "Huawei's backend": _huawei_backend,
}
"""A plugin that runs on a CPU needs each of them; a test checks which."""
