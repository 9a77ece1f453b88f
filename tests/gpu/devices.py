"""How the setups of ColossalAI's plugins run on the GPUs at hand. Nothing here needs one."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic_ckpt.checkpoint.verify import verify_full
from tests import plugins
from tests.integration.ranks import run_ranks
from tests.plugins import STEPS, Setup

NCCL = "nccl"
SECONDS = 600.0  # the first setup of a kind may compile kernels
_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # or its sums depend on what else is running


def gpus() -> int:
    """Return the number of GPUs without initializing CUDA."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def fitting(setup: Setup, available: int) -> Setup | None:
    """It on as many GPUs as it needs, or on one if its ranks differ in their data alone."""
    if setup.ranks <= available:
        return setup
    if available < 1 or not is_data_parallel(setup):
        return None
    return replace(setup, ranks=1)


def is_data_parallel(setup: Setup) -> bool:
    """Whether each rank could do without the others."""
    return all(setup.options.get(f"{axis}_size", 1) == 1 for axis in ("tp", "pp", "sp", "ep"))


def run(function: Callable[..., Any], setup: Setup, *args: Any, backend: str = NCCL) -> list[Any]:
    """``function(rank, setup, *args)`` on its ranks, with sums in an order that stays the same."""
    return run_ranks(
        _repeatable, setup.ranks, function, setup, *args, seconds=SECONDS, backend=backend
    )


def _repeatable(rank: int, function: Callable[..., Any], *args: Any) -> Any:
    import torch

    os.environ.update(_CUBLAS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    return function(rank, *args)


def failure(results: list[Any]) -> str:
    """How a rank failed; empty if none did."""
    for result in results:
        if isinstance(result, int):
            return f"exit code {result}"
        if result and isinstance(result[0], str):
            return f"{result[0]}: {result[1]}"
    return ""


def check_resume(setup: Setup, place: Path, backend: str = NCCL) -> None:
    """Train, save, and resume in new processes; the result must equal an uninterrupted run's.

    Raises:
        AssertionError: something does, or a rank failed.
    """
    job = str(place / "job")
    undisturbed = run(plugins.train_and_save, setup, job, backend=backend)
    assert not failure(undisturbed), failure(undisturbed)
    verify_full(place / "job" / f"epoch-0_step-{STEPS}")
    resumed = run(plugins.load_and_train, setup, job, backend=backend)
    assert not failure(resumed), failure(resumed)
    other = {
        key
        for ranks in zip(undisturbed, resumed, strict=True)
        for mine, theirs in zip(*ranks, strict=True)
        for key in mine
        if mine[key] != theirs[key]
    }
    assert not other, f"a resume has other {', '.join(sorted(other))}"
