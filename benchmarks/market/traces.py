"""What a spot market does to its nodes: one recorded trace, and generators of others.

A trace is a list of changes in order of time; each node comes once and goes at most once. The
generators are Poisson processes whose rates are published statistics, drawn from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

RECORDED = Path(__file__).parent / "p3.trace"
MINUTE, HOUR = 60.0, 3600.0


class Change(NamedTuple):
    """A node comes or goes.

    Attributes:
        at: seconds since the market opened; of a node that goes, when it is gone.
        node: a number, which is not used again.
        comes: whether it comes.
        notice: seconds from the announcement to the end; 0 without any.
    """

    at: float
    node: int
    comes: bool
    notice: float = 0.0


def recorded() -> list[Change]:
    """p3 instances of one zone, without notice, as Bamboo's authors recorded them."""
    found = []
    for line in RECORDED.read_text().splitlines():
        if not line.startswith("#"):
            at, sign, node = line.split()
            found.append(Change(float(at), int(node), sign == "+"))
    return found


def announced(nodes: int, seconds: float, seed: int) -> list[Change]:
    """Two minutes' notice, as AWS gives; each place is lost every 10 h, and empty for 10 min."""
    return _places(nodes, seconds, seed, life=10 * HOUR, empty=10 * MINUTE, notice=120.0)


def preemptible(nodes: int, seconds: float, seed: int) -> list[Change]:
    """30 s of notice, as GCP gives; 15 % of the nodes a day, and every one after 24 h."""
    return _places(
        nodes, seconds, seed, life=24 / 0.15 * HOUR, empty=5 * MINUTE, notice=30.0, oldest=24 * HOUR
    )


def zones(nodes: int, seconds: float, seed: int) -> list[Change]:
    """Two zones, each of which is lost as a whole every 6 h, without notice, for 15 min."""
    rng = random.Random(seed)
    numbers = iter(range(1, 10**9))
    found = []
    for zone in range(2):
        for begin, end in _lives(rng, seconds, 6 * HOUR, 15 * MINUTE):
            for _ in range(zone, nodes, 2):
                found += _life(next(numbers), begin, end, seconds)
    return sorted(found)


GENERATORS: dict[str, Callable[[int, float, int], list[Change]]] = {
    "announced": announced, "preemptible": preemptible, "zones": zones,
}  # fmt: skip


def lanes(changes: list[Change], count: int) -> list[Change]:
    """The lives of ``count`` places: each follows one node, and when that goes, the next to come.

    Nodes in the result are the places' numbers, from 1. Lives and gaps are those of the trace.
    """
    followed: dict[int, int] = {}
    free = list(range(1, count + 1))
    found = []
    for change in changes:
        if change.comes and free:
            followed[change.node] = free.pop(0)
            found.append(change._replace(node=followed[change.node]))
        elif not change.comes and change.node in followed:
            place = followed.pop(change.node)
            free.append(place)
            found.append(change._replace(node=place))
    return found


def several(changes: list[Change], copies: int, apart: float = 7 * MINUTE) -> list[Change]:
    """Copies of one market, each opened some time after the one before it, until the first ends."""
    end = changes[-1].at
    found = [
        one._replace(at=one.at + copy * apart, node=one.node * copies + copy)
        for copy in range(copies)
        for one in changes
    ]
    return sorted(one for one in found if one.at <= end)


def _places(
    nodes: int,
    seconds: float,
    seed: int,
    *,
    life: float,
    empty: float,
    notice: float,
    oldest: float = float("inf"),
) -> list[Change]:
    rng = random.Random(seed)
    numbers = iter(range(1, 10**9))
    found = []
    for _ in range(nodes):
        for begin, end in _lives(rng, seconds, life, empty, oldest):
            found += _life(next(numbers), begin, end, seconds, notice)
    return sorted(found)


def _lives(
    rng: random.Random, seconds: float, life: float, empty: float, oldest: float = float("inf")
) -> Iterator[tuple[float, float]]:
    at = 0.0
    while at < seconds:
        end = at + min(oldest, rng.expovariate(1 / life))
        yield at, end
        at = end + rng.expovariate(1 / empty)


def _life(node: int, begin: float, end: float, seconds: float, notice: float = 0.0) -> list[Change]:
    gone = [Change(end, node, False, notice)] if end < seconds else []
    return [Change(begin, node, True), *gone]
