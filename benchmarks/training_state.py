"""A model and its optimizer whose fp32 state has a wanted size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_COPIES = 3
"""Of each parameter: itself, and AdamW's two moments."""

_LAYERS = 120


@dataclass
class TrainingState:
    """What is saved; the same on every rank, as under DistributedDataParallel.

    Attributes:
        bare: the module, whose parameters ``model`` shares.
        model: the module wrapped by DistributedDataParallel, or the module itself.
    """

    bare: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor of the model and of the optimizer."""
        moments = (held.values() for held in self.optimizer.state.values())
        return itertools.chain(self.bare.parameters(), *moments)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @torch.no_grad()
    def change(self) -> None:
        """One pass in place over all of it, as an optimizer's step makes."""
        for tensor in self.tensors():
            if tensor.numel() > 1:
                tensor.mul_(1.0001)

    def state_dict(self) -> dict[str, Any]:
        """As a script that saves by itself puts it together."""
        return {
            "model": self.bare.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
        }


def make_state(megabytes: float, *, wrap: bool, device: str = "cpu") -> TrainingState:
    """A stack of linear layers under AdamW; every tensor is filled.

    Args:
        wrap: by DistributedDataParallel; collective then.
    """
    parameters = megabytes * 1e6 / 4 / _COPIES
    width = max(8, int(math.sqrt(parameters / _LAYERS)) // 8 * 8)
    layers = max(1, round(parameters / (width * width + width)))
    torch.manual_seed(0)
    with torch.device(device):
        bare = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-4)
    for parameter in bare.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    model = nn.parallel.DistributedDataParallel(bare) if wrap else bare
    return TrainingState(bare, model, optimizer, scheduler)
