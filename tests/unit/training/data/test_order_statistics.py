"""Beside ``torch.randperm``: the order is as random as that is, in what a training could notice.

Each statistic is a chi-square over a table of 24 x 24 cells (24 patterns for the last one). Its
mean over many orders must lie where the mean over as many of ``torch.randperm`` lies. All seeds are
fixed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import permutations, product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from elastic_ckpt.training.data import order as module
from elastic_ckpt.training.data.order import SHUFFLED, Order

Indices = NDArray[np.int64]
Draw = Callable[[int, int, int], Indices]

CELLS = 24
ORDERS = 60
WIDEST = 4.5
"""Standard errors between the two means."""


def ours(size: int, seed: int, epoch: int) -> Indices:
    return Order(size, seed, epoch, 2).samples(0, 1, size).astype(np.int64)


def theirs(size: int, seed: int, epoch: int) -> Indices:
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(size, generator=generator).numpy()


def chi_square(counts: Indices) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def table(rows: Indices, columns: Indices) -> float:
    return chi_square(np.bincount(rows * CELLS + columns, minlength=CELLS**2))


def statistics(draw: Draw, size: int, seed: int, epoch: int) -> dict[str, float]:
    found, index, half = draw(size, seed, epoch), np.arange(size), size // 2
    next_epoch, next_seed = draw(size, seed, epoch + 1), draw(size, seed + 1, epoch)

    def upper(values: Indices) -> Indices:
        return values * CELLS // size

    def lower(values: Indices) -> Indices:
        return values % CELLS

    fours = np.argsort(found[: size // 4 * 4].reshape(-1, 4), axis=1)
    patterns = Counter(map(tuple, fours.tolist()))
    return {
        "positions": table(upper(index), upper(found)),
        "positions, low digits": table(lower(index), lower(found)),
        "positions, low by high": table(lower(index), upper(found)),
        "neighbours": table(upper(found[:-1]), upper(found[1:])),
        "neighbours, low digits": table(lower(found[:-1]), lower(found[1:])),
        "neighbours, differences": table(lower(index[:-1]), upper((found[1:] - found[:-1]) % size)),
        "half an epoch apart": table(upper(found[:half]), upper(found[half : 2 * half])),
        "epochs": table(upper(found), upper(next_epoch)),
        "epochs, low digits": table(lower(found), lower(next_epoch)),
        "seeds": table(upper(found), upper(next_seed)),
        "four in a row": chi_square(np.array([patterns[one] for one in permutations(range(4))])),
    }


def distances(size: int) -> dict[str, float]:
    """How far the means lie from torch.randperm's, in standard errors."""
    drawn = [(number % 5, 2 * number) for number in range(ORDERS)]
    mine = [statistics(ours, size, seed, epoch) for seed, epoch in drawn]
    peers = [statistics(theirs, size, seed, epoch) for seed, epoch in drawn]
    found = {}
    for name in mine[0]:
        a, b = (np.array([one[name] for one in many]) for many in (mine, peers))
        found[name] = float(abs(a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / ORDERS))
    return found


@pytest.mark.parametrize("size", [SHUFFLED, SHUFFLED + 1, 8192, 16_384, 20_000])
def test_an_order_is_as_random_as_randperm(size: int) -> None:
    """The sort, and networks that fill their power of two and that hardly fill half of it."""
    found = distances(size)
    assert max(found.values()) < WIDEST, found


def test_a_network_of_fewer_rounds_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics would notice."""
    monkeypatch.setattr(module, "ROUNDS", 4)
    assert max(distances(8192).values()) > WIDEST
    monkeypatch.setattr(module, "ROUNDS", 2)
    found = distances(8192)
    assert sum(one > WIDEST for one in found.values()) > 6


def test_each_order_of_four_is_about_equally_likely() -> None:
    """As chi-square over the 24, beside that of torch.randperm."""
    drawn = list(product(range(40), range(60)))
    for draw in (ours, theirs):
        counts = Counter(tuple(draw(4, seed, epoch).tolist()) for seed, epoch in drawn)
        found = chi_square(np.array([counts[one] for one in permutations(range(4))]))
        assert 7 < found < 50  # of 23 degrees of freedom: all but 0.1 % on either side


def test_a_sample_is_anywhere_in_an_epoch() -> None:
    """The first, the last and a middle sample, over 1,000 epochs and as many seeds."""
    size = 5000
    for position, by_epoch in product((0, 2499, 4999), (True, False)):
        found = [
            int(Order(size, *(3, turn) if by_epoch else (turn, 3), 2).samples(position, 1, 1)[0])
            for turn in range(1000)
        ]
        cells = np.bincount(np.array(found) * 20 // size, minlength=20)
        assert 5 < chi_square(cells) < 44  # of 19 degrees of freedom
