"""A job keeps the order of samples that it began with, whatever disturbs it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import (
    ElasticSampler,
    Session,
    StatefulDistributedSampler,
    load_checkpoint,
    resume_place,
    save_checkpoint,
    should_save,
)
from elastic_ckpt.checkpoint.verify import read_manifest
from elastic_ckpt.training.data.order import Order
from tests.integration.ranks import run_ranks
from tests.integration.test_session import run
from tests.scripts.format_fixture import Note

FIXTURES = Path(__file__).parents[1] / "fixtures"
SIZE, USED = 5000, 8
"""Samples in all, and those that the fixtures have used."""


def order(epoch: int, version: int) -> list[int]:
    found: list[int] = Order(SIZE, 3, epoch, version).samples(0, 1, SIZE).tolist()
    return found


def parts() -> tuple[Any, ...]:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)


def with_session(directory: str, leave_after: int) -> dict[str, Any]:
    """Two epochs in steps of 500 samples, or of each rank's share of them."""
    model, optimizer, scheduler = parts()
    data = TensorDataset(torch.arange(float(SIZE)).view(SIZE, 1))
    replicas = dist.get_world_size() if dist.is_initialized() else 1
    sampler = ElasticSampler(data, seed=3)
    loader = DataLoader(data, batch_size=500 // replicas, sampler=sampler)
    place = resume_place(directory)
    extra = {"note": Note()}
    wrapped = nn.parallel.DistributedDataParallel(model) if replicas > 1 else model
    used: dict[int, list[int]] = {}
    lengths = []
    with Session(
        directory, model=wrapped, optimizer=optimizer, lr_scheduler=scheduler, extra=extra,
        save_interval=4,
    ) as session:  # fmt: skip
        for epoch in session.epochs(2):
            lengths.append(len(loader))
            for (values,) in session.batches(loader):
                used.setdefault(epoch, []).extend(values.int().flatten().tolist())
                wrapped(values / SIZE).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                if session.step == leave_after:
                    raise SystemExit(9)
    return {
        "used": used, "place": place.sample_start_index, "lengths": lengths,
        "weights": [one.tolist() for one in model.parameters()],
    }  # fmt: skip


@pytest.mark.parametrize(("fixture", "version"), [("order-1", 1), ("format-2", 2)])
def test_a_session_continues_in_the_order_of_its_checkpoint(
    tmp_path: Path, fixture: str, version: int
) -> None:
    """``order-1`` was written before orders had versions; its order is kept in later epochs, and in
    the checkpoints that follow."""
    shutil.copytree(FIXTURES / fixture, tmp_path / "job")
    assert run(with_session, str(tmp_path / "job"), 13) == 9
    made = read_manifest(tmp_path / "job" / "epoch-0_step-12")
    assert (made.order_version, made.sample_start_index) == (version, USED + 8 * 500)
    result = run(with_session, str(tmp_path / "job"), -1)
    assert result["place"] == USED + 8 * 500
    assert result["used"] == {0: order(0, version)[USED + 8 * 500 :], 1: order(1, version)}
    assert result["lengths"][-1] == 10  # of the epoch to come, before its batches are requested


def test_an_interrupted_run_is_an_undisturbed_run(tmp_path: Path) -> None:
    calm = run(with_session, str(tmp_path / "calm"), -1)
    assert calm["used"] == {0: order(0, 2), 1: order(1, 2)}
    assert run(with_session, str(tmp_path / "wild"), 7) == 9
    wild = run(with_session, str(tmp_path / "wild"), -1)
    assert wild["used"] == {0: order(0, 2)[2000:], 1: order(1, 2)}
    assert wild["weights"] == calm["weights"]


def ranks_with_session(rank: int, directory: str) -> dict[str, Any]:
    return with_session(directory, -1)


def test_more_ranks_finish_the_epoch_in_the_same_order(tmp_path: Path) -> None:
    """Of a checkpoint of the first version, in the middle of an epoch."""
    shutil.copytree(FIXTURES / "order-1", tmp_path / "job")
    found = run_ranks(ranks_with_session, 2, str(tmp_path / "job"))
    for epoch, begin in ((0, USED), (1, 0)):
        assert [one["used"][epoch] for one in found] == [
            order(epoch, 1)[begin + rank :: 2] for rank in range(2)
        ]


def with_functions(directory: str, stop: int) -> list[int]:
    model, optimizer, scheduler = parts()
    data = TensorDataset(torch.arange(float(SIZE)).view(SIZE, 1))
    sampler = StatefulDistributedSampler(data, seed=3)
    epoch, step, _ = load_checkpoint(directory, None, model, optimizer, scheduler)
    used: list[int] = []
    for _ in range(2):
        sampler.set_epoch(epoch)
        for (values,) in DataLoader(data, batch_size=500, sampler=sampler):
            used += values.int().flatten().tolist()
            model(values / SIZE).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if should_save(step) or step == stop:
                save_checkpoint(directory, None, model, optimizer, scheduler, epoch, step, 500)
            if step == stop:
                return used
        epoch += 1
    return used


def test_the_functions_continue_in_the_order_of_the_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "order-1", tmp_path / "job")
    first = run(with_functions, str(tmp_path / "job"), 7)
    assert first == order(0, 1)[USED : USED + 3 * 500]
    assert read_manifest(tmp_path / "job" / "epoch-0_step-7").order_version == 1
    second = run(with_functions, str(tmp_path / "job"), -1)
    assert second == order(0, 1)[USED + 3 * 500 :] + order(1, 1)
