"""Trainers that differ only in how they are spread over ranks, and their gathered state."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.training.engines.torch.engine import TorchEngine
from elastic_ckpt.training.engines.torch.state import bare, canonical_names


class Net(nn.Module):
    """Rows that no world size divides, a parameter of one element, tied weights, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 33)
        self.layers = nn.ModuleList(nn.Linear(33, 33) for _ in range(6))
        self.gain = nn.Parameter(torch.rand(1))
        self.head = nn.Linear(33, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        out = self.embedding(words)
        for layer in self.layers:
            out = torch.tanh(layer(out))
        logits: torch.Tensor = self.head(out * self.gain)
        return logits


class Trainer:
    """A model that is ``plain``, ``ddp`` or ``fsdp``; AdamW with two groups; a schedule."""

    def __init__(self, kind: str, seed: int = 1) -> None:
        torch.manual_seed(seed)
        self.model = spread(Net(), kind)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [one for one in parameters if one.dim() > 1], "weight_decay": 0.1},
            {"params": [one for one in parameters if one.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.9)

    @property
    def engine(self) -> TorchEngine:
        return TorchEngine(self.model, self.optimizer, self.scheduler)

    def train(self, first: int, last: int) -> Trainer:
        """Train with gradients that depend only on the parameter's name and the step."""
        state = self.model.state_dict(keep_vars=True)
        names = canonical_names(self.model, state)
        for step in range(first, last):
            for key, value in state.items():
                if isinstance(value, nn.Parameter):
                    value.grad = gradient(value, f"{names[key]} {step}")
            self.optimizer.step()
            self.scheduler.step()
            bare(self.model).seen += step
        return self

    def gathered(self) -> dict[str, torch.Tensor]:
        """Return every tensor of the state, gathered. Collective for ``fsdp``."""
        state = self.model.state_dict(keep_vars=True)
        names = canonical_names(self.model, state)
        found = {names[key]: value for key, value in state.items()}
        for key, value in state.items():
            for moment, held in self.optimizer.state.get(value, {}).items():
                found[f"{names[key]}.{moment}"] = held
        return {name: full(tensor) for name, tensor in found.items()}


def spread(model: Net, kind: str) -> Any:
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp":
        try:
            from torch.distributed.fsdp import fully_shard
        except ImportError:  # torch 2.5
            from torch.distributed._composable.fsdp import fully_shard
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def gradient(parameter: torch.Tensor, of: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(of.encode()).digest()[:4], "big")
    values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    if isinstance(parameter, DTensor):
        return distribute_tensor(values, parameter.device_mesh, parameter.placements)
    return values


def full(tensor: torch.Tensor) -> torch.Tensor:
    gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach().clone()


def save(trainer: Trainer, directory: Path, rank: int) -> None:
    """Save a checkpoint and the same state by other means, for :func:`differences`."""
    directory.mkdir(exist_ok=True)
    trainer.engine.save(directory, DiskPart(directory, "tested", rank))
    gathered = trainer.gathered()
    if rank == 0:
        save_file(gathered, directory / "expected")


def differences(trainer: Trainer, directory: Path) -> list[str]:
    """Return names of tensors that differ from the saved ones. Collective for ``fsdp``."""
    return differing(trainer.gathered(), load_file(directory / "expected"))


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    names = set(found) ^ set(expected)
    names.update(
        name for name in set(found) & set(expected) if bits(found[name]) != bits(expected[name])
    )
    return sorted(names)


def bits(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), flat.numpy().tobytes()
