"""The random state of this process: Python's, NumPy's, torch's, and CUDA's if it is in use."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def capture_rng() -> dict[str, Any]:
    """Return a copy of every generator's state, as plain values and tensors."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    cuda: Any = torch.cuda
    if cuda.is_available() and cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Restore what :func:`capture_rng` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def diverge_rng(number: int) -> None:
    """Derive a random state of its own from one that another process has as well. The result
    depends only on that and the number, on any machine."""
    drawn = int(torch.randint(2**62, ()))
    seed = int.from_bytes(hashlib.sha256(f"{drawn} {number}".encode()).digest()[:4], "big")
    random.seed(seed)
    torch.manual_seed(seed)  # CUDA's, too
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


def reseed_numpy() -> None:
    """Reseed NumPy in a forked process, as its import would. Python's generator does so by itself,
    and torch's seed is the same in every process."""
    random_numbers: Any = sys.modules.get("numpy.random")
    if random_numbers is not None:
        random_numbers.seed()


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the random state after the body."""
    state = capture_rng()
    try:
        yield
    finally:
        restore_rng(state)
