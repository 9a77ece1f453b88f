"""A single bit is found and named, and nothing is found where nothing changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.cli.replay.comparison import Chain, first_difference
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.audit_events import StateDigest
from elastic_ckpt.training.digests import DigestChain, named_state
from tests.checkpoints import open_job

FLIPS = 1000


class Kept:
    """A journal that keeps what it is given."""

    def __init__(self) -> None:
        self.events: list[StateDigest] = []

    def write(self, event: StateDigest) -> None:
        self.events.append(event)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several are slower here by far."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Rank:
    """One rank's model and optimizer, and the digests that it notes."""

    def __init__(self, job: JobDirectory, rank: int = 0, every: int = 1) -> None:
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.model.register_buffer("scale", torch.ones(7, dtype=torch.bfloat16))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.kept: Any = Kept()
        self.rank = rank
        self.step = 0
        self.chain = DigestChain(every, job, self.kept, rank, self.model, self.optimizer)

    def train(self, change: Any = None) -> None:
        self.step += 1
        inputs = torch.full((4, 5), 0.1 * self.step) + torch.arange(4.0)[:, None] + self.rank
        self.model(inputs).square().mean().backward()
        if change is not None:
            change()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def note(self) -> Chain:
        self.kept.events.clear()
        if self.chain.is_due(self.step):
            self.chain.note(Position(step=self.step), 0.5)
        return {(one.step, self.rank): one for one in self.kept.events}

    @property
    def names(self) -> list[str]:
        return [name for name, _ in named_state(self.model, self.optimizer)]


def flip(tensor: torch.Tensor, bit: int) -> None:
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    data[bit // 8] ^= 1 << bit % 8


def test_every_bit_flip_in_weights_and_moments_is_found_and_named(job: JobDirectory) -> None:
    draw, ranks = random.Random(5), [Rank(job, rank) for rank in range(4)]
    for made in ranks:
        made.train()
    before = [made.note() for made in ranks]
    for number in range(FLIPS):
        rank = ranks[draw.randrange(4)]
        name, tensor = draw.choice(list(named_state(rank.model, rank.optimizer)))
        bit = draw.randrange(8 * tensor.numel() * tensor.element_size())
        flip(tensor, bit)
        found = first_difference(before[rank.rank], rank.note(), {rank.rank: rank.names})
        assert found is not None, f"flip {number} in {name}"
        assert (found.step, found.rank, found.what) == (1, rank.rank, name)
        flip(tensor, bit)
    assert [made.note() for made in ranks] == before


def test_a_bit_flip_in_a_gradient_is_found_unless_it_changed_nothing(job: JobDirectory) -> None:
    draw, found_ones = random.Random(6), 0
    for _ in range(200):
        one, other = Rank(job), Rank(job)
        index = draw.randrange(len(list(other.model.parameters())))

        def change(other: Rank = other, index: int = index) -> None:
            gradient = list(other.model.parameters())[index].grad
            assert gradient is not None
            flip(gradient, draw.randrange(8 * gradient.numel() * gradient.element_size()))

        one.train()
        other.train(change)
        states = [dict(named_state(made.model, made.optimizer)) for made in (one, other)]
        changed = [
            name
            for name, value in states[0].items()
            if value.contiguous().view(-1).view(torch.uint8).tolist()
            != states[1][name].contiguous().view(-1).view(torch.uint8).tolist()
        ]
        found = first_difference(one.note(), other.note(), {0: one.names})
        assert (found is not None) is bool(changed)
        if found is not None:
            assert found.what.startswith(changed[0])
            found_ones += 1
    assert found_ones > 150


@pytest.mark.timeout(1200)  # of the long one
@pytest.mark.parametrize("steps", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_undisturbed_steps_raise_no_alarm(job: JobDirectory, steps: int) -> None:
    one, other = Rank(job), Rank(job)
    for _ in range(steps):
        for made in (one, other):
            made.train()
        assert first_difference(one.note(), other.note(), {}) is None


def test_digests_are_noted_every_so_many_steps(tmp_path: Path) -> None:
    rank, noted = Rank(open_job(tmp_path), every=3), []
    for _ in range(7):
        rank.train()
        noted += [step for step, _ in rank.note()]
    assert noted == [3, 6]
    silent = Rank(open_job(tmp_path), every=0)
    silent.train()
    assert silent.note() == {}
