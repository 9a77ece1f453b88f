"""Loaders that no ElasticSampler feeds: resumed at the batch that was consumed, or said not to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)

from elastic_ckpt import ElasticSampler, Session
from elastic_ckpt.errors import UsageError
from elastic_ckpt.training import departure
from elastic_ckpt.training.data.loaders import inspect
from tests.integration.ranks import run_ranks
from tests.integration.test_rank_local import bits
from tests.marks import slow

DATA = TensorDataset(torch.arange(40.0).reshape(20, 2) / 40, torch.arange(20))


class Counting:
    """A loader as another library has it: a shuffled order of its own, and a state. It is asked for
    the state only after the batch that it yielded last, as it reads ahead of nothing."""

    def __init__(self, rank: int, batches: int = 5) -> None:
        self.rank, self.batches = rank, batches
        self.epoch, self.at, self._resumes = -1, 0, False

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        if not self._resumes:
            self.epoch, self.at = self.epoch + 1, 0
        self._resumes = False
        order = torch.Generator().manual_seed(7 + self.epoch * 2 + self.rank)
        for number in torch.randperm(20, generator=order).tolist()[self.at : self.batches]:
            self.at += 1
            yield DATA[number : number + 1]
        self.at = 0 if self.at < self.batches else self.at

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["at"] > self.batches:
            raise ValueError("the stream is shorter")
        self.epoch, self.at = state["epoch"], state["at"]
        self._resumes = self.at < self.batches


class Numbers(IterableDataset[Any]):
    """A stream without a length, and without a state."""

    def __init__(self, length: int = 20) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        return (DATA[number] for number in range(self.length))


def loader_of(kind: str, rank: int, world: int) -> tuple[tuple[Any, ...], str | None]:
    """Return what a script gives to ``session.batches``."""
    shuffled = DataLoader(DATA, batch_size=4, shuffle=True)
    match kind:
        case "duck":
            return (Counting(rank),), None
        case "shuffled":
            return (shuffled,), "skip"
        case "workers":
            return (DataLoader(DATA, batch_size=4, shuffle=True, num_workers=2),), "skip"
        case "stream":
            return (DataLoader(Numbers(), batch_size=4),), "skip"
        case "anew":
            return (DataLoader(Numbers(), batch_size=4),), "approximate"
        case "batch_sampler":
            sampler = ElasticSampler(DATA, world, rank, seed=3)
            return (DataLoader(DATA, batch_sampler=BatchSampler(sampler, 2, False)),), None
        case "beside":
            order = ElasticSampler(DATA, world, rank, seed=3)
            other = ElasticSampler(DATA, world, rank, seed=8)
            first = DataLoader(DATA, batch_size=2, sampler=order)
            return (first, Counting(rank, 3), DataLoader(DATA, batch_size=3, sampler=other)), None
    raise AssertionError(kind)


def train(
    rank: int, directory: str, kind: str, world: int, stop: int, ahead: int = 0, leave: int = 0
) -> dict[str, Any]:
    """Train three epochs, or up to step ``stop``, where the script dies.

    Args:
        ahead: batches that the script requests before it uses them.
        leave: batches after which the script leaves each epoch; 0 for none.
    """
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen: list[list[int]] = []
    loaders, position = loader_of(kind, rank, world)
    session = Session(directory, model=model, optimizer=optimizer, save_interval=2)
    left = -1
    try:
        with session as run:
            for _ in run.epochs(3):
                batches = run.batches(*loaders, position=position)
                if kind != "stream" and kind != "anew":
                    left = left if left >= 0 else len(batches)
                for batch in looking(batches, ahead):
                    parts = [batch] if len(loaders) == 1 else batch
                    seen.append([int(one) for part in parts for one in part[1].reshape(-1)])
                    loss = sum(model(part[0]).pow(2).mean() for part in parts)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if stop and len(seen) == stop:
                        raise KeyboardInterrupt
                    if leave and (run.step + 1) % leave == 0:
                        break
    except KeyboardInterrupt:
        pass
    return {
        "seen": seen, "left": left, "bits": bits(*model.parameters()),
        "from": session.resumed_from.name if session.resumed_from else "",
    }  # fmt: skip


def looking(batches: Any, ahead: int) -> Iterator[Any]:
    held: list[Any] = []
    for batch in batches:
        held.append(batch)
        if len(held) > ahead:
            yield held.pop(0)
    yield from held


def same(place: Path, kind: str, world: int, *stops: int, **how: Any) -> list[Any]:
    """Run undisturbed; and dying after ``stop`` steps, then resumed: bits and samples are equal."""
    whole = run_ranks(train, world, str(place / "whole"), kind, world, 0, *how.values())
    firsts = []
    for stop in stops:
        job = str(place / str(stop))
        run_ranks(train, world, job, kind, world, stop, *how.values())
        resumed = run_ranks(train, world, job, kind, world, 0, *how.values())
        for before, after in zip(whole, resumed, strict=True):
            assert isinstance(after, dict), after
            done = int(after["from"].rpartition("-")[2])
            assert after["seen"] == before["seen"][done:]
            assert after["bits"] == before["bits"]
        firsts.append(resumed[0])
    return firsts


KINDS = {"duck": 2, "shuffled": 1, "workers": 2, "stream": 2, "batch_sampler": 1}
"""With the number of ranks that each test run has."""


@pytest.mark.parametrize(
    ("kind", "world"),
    [*KINDS.items(), *(slow(kind, 3 - world) for kind, world in KINDS.items())],
)
def test_exact_at_the_same_world_size(tmp_path: Path, kind: str, world: int) -> None:
    same(tmp_path, kind, world, 5, 8)  # saved after step 4 of 5, and in the next epoch


@pytest.mark.parametrize("kind", ["duck", "shuffled"])
def test_position_is_what_was_consumed(tmp_path: Path, kind: str) -> None:
    same(tmp_path, kind, 1, 4, ahead=2, leave=0)


@pytest.mark.parametrize("kind", ["duck", "shuffled"])
def test_script_that_leaves_its_epochs_early(tmp_path: Path, kind: str) -> None:
    same(tmp_path, kind, 1, 4, 5, 7, ahead=0, leave=3)


def test_loaders_beside_the_one_that_counts(tmp_path: Path) -> None:
    resumed = same(tmp_path, "beside", 2, 4, 7, 12)
    assert [one["left"] for one in resumed] == [3, 4, 0]  # of 5, saved after steps 2, 6 and 10


def test_length_is_what_is_left(tmp_path: Path) -> None:
    [duck] = same(tmp_path / "duck", "duck", 1, 5)
    [order] = same(tmp_path / "order", "batch_sampler", 1, 5)
    assert (duck["left"], order["left"]) == (1, 6)


def test_approximate_begins_anew_and_is_recorded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(train, 1, str(tmp_path), "anew", 1, 4)
    [resumed] = run_ranks(train, 1, str(tmp_path), "anew", 1, 0)
    assert resumed["seen"][0] == [0, 1, 2, 3]
    [line] = [one for one in capfd.readouterr().err.splitlines() if "bit for bit" in one]
    assert 'begin anew in this epoch, as position="approximate" says' in line
    files = (tmp_path / ".elastic-ckpt").rglob("*.jsonl")
    assert sum(one.read_text().count('"inexact"') for one in files) == 1


def test_another_world_size_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(train, 2, str(tmp_path), "duck", 2, 4)
    [resumed] = run_ranks(train, 1, str(tmp_path), "duck", 1, 0)
    assert len(resumed["seen"]) == 3 + 2 * 5
    [line] = [one for one in capfd.readouterr().err.splitlines() if "bit for bit" in one]
    assert "2 ranks saved the places of their loaders" in line


# -- what goes wrong is one line, on every rank -----------------------------------------------


def refuse(rank: int, directory: str) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Session(directory, model=model, optimizer=optimizer) as run:
        for _ in run.epochs(3):
            for inputs, _ in run.batches(Counting(rank, 1 if rank else 5)):
                model(inputs).sum().backward()
                optimizer.step()


def test_refused_state_fails_all_ranks(tmp_path: Path) -> None:
    run_ranks(train, 2, str(tmp_path), "duck", 2, 4)
    for kind, text in run_ranks(refuse_shape, 2, str(tmp_path)):
        assert kind == "DataMismatch"
        assert "the Counting cannot continue where the checkpoint was made: the stream is" in text
        assert "\n" not in text


def refuse_shape(rank: int, directory: str) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    model = nn.parallel.DistributedDataParallel(model)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with Session(directory, model=model, optimizer=optimizer, save_interval=2) as run:
        for _ in run.epochs(3):
            next(run.batches(Counting(rank, 1 if rank else 5)))


class Forgetful(DataLoader[Any]):
    """Its state has the number of batches, and not their order."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_state_without_the_order_is_refused() -> None:
    weighted = WeightedRandomSampler([1.0] * len(DATA), len(DATA))
    with pytest.raises(UsageError, match=r"the order of a WeightedRandomSampler.*\"skip\""):
        inspect(Forgetful(DATA, sampler=weighted), None, 1)
    assert inspect(Forgetful(DATA, sampler=weighted), "skip", 1).how == "skip"
    assert inspect(Forgetful(DATA), None, 1).how == "state"
    assert inspect(Forgetful(Numbers()), None, 1).how == "state"


def test_unequal_lengths_fail_before_training(tmp_path: Path) -> None:
    for kind, text in run_ranks(refuse, 2, str(tmp_path)):
        assert kind == "UnequalSteps" and "different numbers of batches (1 5)" in text


def end_apart(rank: int, directory: str) -> None:
    departure.UNKNOWN_SECONDS = 4.0  # type: ignore[misc]
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stream = DataLoader(Numbers(8 if rank else 20), batch_size=4)
    with Session(directory, model=model, optimizer=optimizer) as run:
        for _ in run.epochs(3):
            for inputs, _ in run.batches(stream, position="skip"):
                model(inputs).sum().backward()
                optimizer.step()


def test_stream_that_ends_early_on_one_rank_is_no_hang(tmp_path: Path) -> None:
    first, second = run_ranks(end_apart, 2, str(tmp_path))
    assert first[0] == "RuntimeError", first  # of gloo's, as rank 1 has left
    assert second[0] == "UnequalSteps"
    assert "the data of rank 1 ended in epoch 0 after step 2, but rank 0 did not" in second[1]
