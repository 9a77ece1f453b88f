"""State that differs by rank: each rank resumes with its own, and what is equal lies there once."""

from __future__ import annotations

import importlib.util
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Session, load_checkpoint, save_checkpoint
from tests.integration.ranks import run_ranks

dist: Any = distributed


class Net(nn.Module):
    """Normalises by a running mean, which each rank has of its own samples."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("table", torch.arange(20_000.0))
        self.linear = nn.Linear(16, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(inputs.mean(0), alpha=0.1)
        out: torch.Tensor = self.linear(self.norm(inputs) - self.mean)
        return out


class Kept:
    """An extra object: a tensor, and a counter."""

    def __init__(self, size: int) -> None:
        self.value, self.count = torch.zeros(size), 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.count = state["value"].clone(), state["count"]


def bits(*values: Any) -> list[str]:
    """Digests of the values' bits: what a rank returns has to fit into a pipe."""
    flat = [torch.as_tensor(one).detach().contiguous().reshape(-1) for one in values]
    return [sha256(one.view(torch.uint8).numpy().tobytes()).hexdigest()[:16] for one in flat]


def train(rank: int, directory: str, epochs: int) -> dict[str, Any]:
    torch.manual_seed(1)
    model = DistributedDataParallel(Net(), broadcast_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = TensorDataset(torch.randn(64, 16), torch.randn(64, 1))
    loader = DataLoader(data, batch_size=4, sampler=ElasticSampler(data, seed=0))
    mine, common = Kept(3), Kept(30_000)
    extra = {"mine": mine, "common": common}
    with Session(directory, model=model, optimizer=optimizer, save_interval=3, extra=extra) as run:
        first = run.step
        for _ in run.epochs(epochs):
            for inputs, wanted in run.batches(loader):
                (model(inputs) - wanted).pow(2).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                mine.value += inputs.sum()
                common.value += 0.1
                mine.count, common.count = mine.count + rank, common.count + 1
    state = optimizer.state.values()
    return {
        "first": first,
        "buffers": bits(*model.buffers()),
        "mine": bits(mine.value, mine.count),
        "common": bits(common.value[:3], common.count),
        "parameters": bits(*model.parameters()),
        "moments": bits(*(one["exp_avg_sq"] for one in state)),
    }


def train_alone(rank: int, directory: str) -> int:
    first: int = train(rank, directory, 3)["first"]
    return first


def of_rank(place: Path, rank: int, end: str) -> Path:
    return place / "ranks" / f"{rank:05d}.{end}"


def test_each_rank_resumes_with_its_own_buffers_and_objects(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = run_ranks(train, 2, str(tmp_path / "whole"), 2)
    run_ranks(train, 2, str(tmp_path / "job"), 1)
    resumed = run_ranks(train, 2, str(tmp_path / "job"), 2)
    assert [one.pop("first") for one in resumed] == [8, 8]
    assert [one.pop("first") for one in whole] == [0, 0]
    assert resumed == whole
    for name in ("buffers", "mine"):
        assert whole[0][name] != whole[1][name]

    # the equal buffer and object are written once, for both ranks
    [place] = tmp_path.glob("job/epoch-*_step-16")
    second = json.loads(of_rank(place, 1, "json").read_text())
    assert set(second["extra"]) == {"mine"} and second["shared"] == ["common"]
    assert set(second["model"]) == {"mean", "norm.running_mean", "norm.running_var"}
    assert of_rank(place, 1, "safetensors").stat().st_size < 20_000
    assert of_rank(place, 0, "safetensors").stat().st_size > 120_000

    # on one rank, all of it is not to be had, and one line says what it gets
    assert "bit for bit" not in capfd.readouterr().err
    run_alone = run_ranks(train_alone, 1, str(tmp_path / "job"))
    assert run_alone == [16]
    [line] = [one for one in capfd.readouterr().err.splitlines() if "bit for bit" in one]
    assert "of 3 buffers every rank has rank 0's" in line
    assert "of 1 extra object rank N has that of rank N % 2" in line


class Mean(nn.Module):
    """Subtracts a running mean; ColossalAI would make BatchNorm a synchronised one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(inputs.detach().mean(0), alpha=0.1)
        return inputs - self.mean


def boosted(kind: str) -> tuple[Any, Any, Any]:
    from colossalai.booster import Booster
    from colossalai.booster.plugin import LowLevelZeroPlugin, TorchDDPPlugin

    from elastic_ckpt.training.engines.colossalai.cpu_shim import patch_training

    patch_training()
    plugin: Any = TorchDDPPlugin() if kind == "ddp" else LowLevelZeroPlugin(precision="fp32")
    torch.manual_seed(1)
    model: Any = nn.Sequential(nn.Linear(4, 8), Mean(), nn.Linear(8, 2))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.1)
    booster = Booster(plugin=plugin)
    model, optimizer, *_ = booster.boost(model, optimizer)
    return booster, model, optimizer


def save_and_load_with_a_booster(rank: int, directory: str, kind: str) -> tuple[Any, Any, Any]:
    booster, model, optimizer = boosted(kind)
    for step in range(2):
        inputs = torch.randn(4, 4, generator=torch.Generator().manual_seed(10 * rank + step))
        booster.backward(model(inputs).sum(), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    save_checkpoint(directory, booster, model, optimizer, None, 0, 2, 4, None)
    others = boosted(kind)
    load_checkpoint(directory, *others, None)
    saved, loaded = (bits(*one.unwrap().buffers()) for one in (model, others[1]))
    moments = (
        bits(*(one["exp_avg"] for one in held.optim.state.values()))
        for held in (optimizer, others[2])
    )
    return saved, loaded, len(set(map(str, moments)))


@pytest.mark.skipif(importlib.util.find_spec("colossalai") is None, reason="needs ColossalAI")
@pytest.mark.parametrize("kind", ["ddp", "zero"])
def test_the_functions_keep_buffers_by_rank_with_colossalai(tmp_path: Path, kind: str) -> None:
    found = run_ranks(save_and_load_with_a_booster, 2, str(tmp_path), kind)
    for saved, loaded, moments in found:
        assert loaded == saved and moments == 1
    assert found[0][0] != found[1][0]
