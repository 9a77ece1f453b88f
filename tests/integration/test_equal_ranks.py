"""Ranks that are not at the same place, or have other data, are refused before they save."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Session, StatefulDistributedSampler, save_checkpoint
from tests.integration.ranks import run_ranks

pytestmark = pytest.mark.one_torch


def uneven(rank: int, directory: str, interval: int) -> int:
    """Leave epoch 0 after 6 batches on rank 0 and 8 on rank 1, as a break by the data does."""
    data = TensorDataset(torch.arange(128.0).reshape(128, 1))
    loader = DataLoader(data, batch_size=4, sampler=ElasticSampler(data))
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    with Session(directory, model=model, optimizer=optimizer, save_interval=interval) as session:
        for epoch in session.epochs(3):
            for batch, (inputs,) in enumerate(session.batches(loader), 1):
                model(inputs).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if epoch == 0 and batch == 6 + 2 * rank:
                    break
    return session.step


@pytest.mark.parametrize("interval", [7, 20])
def test_ranks_at_different_steps_are_an_error_on_both(tmp_path: Path, interval: int) -> None:
    results = run_ranks(uneven, 2, str(tmp_path), interval)
    assert [name for name, _ in results] == ["UnequalSteps"] * 2, results
    for _, text in results:
        assert "step 6" in text
        assert f"step {min(interval, 8)}" in text
    assert not list(tmp_path.glob("epoch-*"))


def local_data(rank: int, directory: str, kind: str) -> int:
    """Give each rank its own shard, its own seed, or its own fingerprint of the same data."""
    generator = torch.Generator().manual_seed(rank if kind == "shards" else 0)
    data: Any = TensorDataset(torch.randn(64, 4, generator=generator))
    if kind == "fingerprints":
        data._fingerprint = f"random {rank}"
    seed = rank if kind == "seeds" else 0
    sampler = (
        ElasticSampler(data, seed=seed)
        if kind == "fingerprints"
        else ElasticSampler(data, num_replicas=1, rank=0, seed=seed)
    )
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Session(directory, model=model, optimizer=optimizer, save_interval=3) as session:
        for _ in session.epochs(1):
            for (inputs,) in session.batches(DataLoader(data, batch_size=8, sampler=sampler)):
                model(inputs).mean().backward()
                optimizer.step()
    return session.step


@pytest.mark.parametrize(("kind", "why"), [("shards", "samples differ"), ("seeds", "has seed 1")])
def test_rank_local_data_are_refused_before_the_first_step(
    tmp_path: Path, kind: str, why: str
) -> None:
    results = run_ranks(local_data, 2, str(tmp_path), kind)
    assert [name for name, _ in results] == ["DataMismatch"] * 2, results
    assert len({text for _, text in results}) == 1
    assert "rank 1 does not have rank 0's data" in results[0][1]
    assert why in results[0][1]
    assert not list(tmp_path.glob("epoch-*"))


def test_a_fingerprint_of_each_rank_is_not_trusted_over_equal_samples(tmp_path: Path) -> None:
    assert run_ranks(local_data, 2, str(tmp_path), "fingerprints") == [4, 4]


def own_loop(rank: int, directory: str, kind: str) -> None:
    """Save from a loop of its own with another step, or another seed, on rank 1."""
    seed, step = (rank, 3) if kind == "seed" else (0, 3 + rank)
    sampler = StatefulDistributedSampler(range(64), seed=seed)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    list(sampler)
    save_checkpoint(directory, None, model, optimizer, None, 0, step, 4)


@pytest.mark.parametrize(
    ("kind", "name", "texts"),
    [
        ("step", "UnequalSteps", ("rank 0", "step 3", "rank 1", "step 4")),
        ("seed", "DataMismatch", ("rank 1", "seed 1", "seed 0")),
    ],
)
def test_plain_functions_compare_the_ranks(
    tmp_path: Path, kind: str, name: str, texts: tuple[str, ...]
) -> None:
    results = run_ranks(own_loop, 2, str(tmp_path), kind)
    assert [result[0] for result in results] == [name] * 2, results
    assert all(text in results[0][1] for text in texts)
    assert not list(tmp_path.glob("epoch-*"))
