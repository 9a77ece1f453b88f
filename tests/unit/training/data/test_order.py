"""The order of an epoch: what each version is, at any size, and that it takes no memory."""

from __future__ import annotations

import tracemalloc
from itertools import islice

import pytest

from elastic_ckpt.training.data.order import ROUNDS, SHUFFLED, Order
from elastic_ckpt.training.data.sampler import ElasticSampler

pytestmark = pytest.mark.filterwarnings("error")  # NumPy warns of integers that overflow

MASK = (1 << 64) - 1
HALF = (1 << 32) - 1
GOLDEN = 0x9E3779B97F4A7C15
BORDERS = [2**31 - 1, 2**31, 2**31 + 1, 2**32, 2**32 + 1, 10**18 - 1, 2**62 + 1, 2**63 - 1]


class Sized:
    """A data set of any length."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def order(size: int, seed: int, epoch: int, version: int = 2) -> list[int]:
    found: list[int] = Order(size, seed, epoch, version).samples(0, 1, size).tolist()
    return found


def at(size: int, begin: int, stride: int, count: int) -> list[int]:
    found: list[int] = Order(size, 3, 1, 2).samples(begin, stride, count).tolist()
    return found


# -- the definition, in plain integers ------------------------------------------------------------


def mix(value: int) -> int:
    """SplitMix64's finalizer."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def key_of(seed: int, epoch: int) -> int:
    return mix((mix((seed & MASK) + GOLDEN & MASK) ^ epoch) + GOLDEN & MASK)


def sorted_order(size: int, seed: int, epoch: int) -> list[int]:
    key = key_of(seed, epoch)
    hashes = [mix((index + 1) * GOLDEN + key & MASK) for index in range(size)]
    signed = [value - (1 << 64) if value >> 63 else value for value in hashes]
    return sorted(range(size), key=lambda index: signed[index])


def walked(size: int, seed: int, epoch: int, index: int) -> int:
    bits = (size - 1).bit_length()
    right_bits = bits // 2
    key = key_of(seed, epoch)
    keys = [mix(key + (turn + 1) * GOLDEN & MASK) >> 32 for turn in range(ROUNDS)]

    def hashed(value: int, key: int, kept: int) -> int:
        value = (value + key) * 0x7FEB352D & HALF
        value = (value ^ (value >> 15)) * 0x846CA68B & HALF
        return value >> (32 - kept)

    while True:
        left, right = index >> right_bits, index & ((1 << right_bits) - 1)
        for turn in range(0, ROUNDS, 2):
            left ^= hashed(right, keys[turn], bits - right_bits)
            right ^= hashed(left, keys[turn + 1], right_bits)
        index = left << right_bits | right
        if index < size:
            return index


# -- the order never changes ----------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("size", "seed", "epoch", "expected"),
    [
        (12, 5, 0, [2, 4, 5, 0, 10, 6, 1, 8, 3, 9, 11, 7]),
        (12, 5, 1, [2, 5, 0, 8, 4, 1, 9, 7, 6, 11, 10, 3]),
        (12, -1, 0, [3, 2, 10, 5, 4, 0, 6, 11, 1, 8, 7, 9]),
        (12, 2**63 + 7, 3, [7, 11, 10, 6, 4, 5, 0, 1, 3, 9, 8, 2]),
        (1, 0, 0, [0]),
    ],
)
def test_a_small_order_is_the_same_in_each_version(
    version: int, size: int, seed: int, epoch: int, expected: list[int]
) -> None:
    assert order(size, seed, epoch, version) == expected


GOLDEN_ORDERS: list[tuple[int, int, int, int, list[int]]] = [
    (1, 5000, 3, 0, [3080, 3994, 3149, 2201, 4694, 4396]),
    (2, 4097, 0, 0, [22, 3026, 3982, 90, 1767, 3596]),
    (2, 5000, 3, 0, [4087, 3537, 3041, 218, 3997, 3834]),
    (2, 5000, 3, 1, [375, 3149, 1001, 1969, 837, 486]),
    (2, 8192, -1, 2, [554, 5782, 4032, 3933, 4489, 7544]),
    (2, 1000000000, 5, 0, [269274520, 475283478, 649368484, 33740888, 910421937, 808202420]),
    (2, 2147483648, 1, 1, [533399823, 768518395, 268678004, 1718808511, 1736416185, 1360063656]),
    (
        2,
        4294967297,
        9223372036854775815,
        3,
        [3274703500, 368030054, 3111443050, 3169876023, 31860084, 2632665561],
    ),
    (
        2,
        9223372036854775807,
        0,
        9,
        [
            3352737589790808756,
            4102984293197157498,
            7476547029977136153,
            7878094684211902194,
            3176941608696583998,
            6052882900852572443,
        ],
    ),
]


@pytest.mark.parametrize(("version", "size", "seed", "epoch", "expected"), GOLDEN_ORDERS)
def test_a_large_order_never_changes(
    version: int, size: int, seed: int, epoch: int, expected: list[int]
) -> None:
    assert Order(size, seed, epoch, version).samples(0, 1, len(expected)).tolist() == expected


@pytest.mark.parametrize(("size", "seed", "epoch"), [(257, 0, 0), (500, 123456789, 41), (3, -9, 2)])
@pytest.mark.parametrize("version", [1, 2])
def test_a_small_order_is_the_documented_sort(
    version: int, size: int, seed: int, epoch: int
) -> None:
    assert order(size, seed, epoch, version) == sorted_order(size, seed, epoch)


def test_version_1_sorts_at_any_size() -> None:
    assert order(5000, 3, 2, 1) == sorted_order(5000, 3, 2)
    assert order(5000, 3, 2, 2) != order(5000, 3, 2, 1)


@pytest.mark.parametrize("size", [SHUFFLED + 1, 5000, 8191, 8192, 8193, 10**9, *BORDERS])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (-1, 7), (2**64 - 1, 2**40)])
def test_a_large_order_is_the_documented_network(size: int, seed: int, epoch: int) -> None:
    begin = size - 40
    found = Order(size, seed, epoch, 2).samples(begin, 1, 40).tolist()
    assert found == [walked(size, seed, epoch, begin + turn) for turn in range(40)]


# -- a permutation, at any size -------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "size", [1, 2, 3, 4, 97, SHUFFLED - 1, SHUFFLED, SHUFFLED + 1, 5000, 8192, 8193, 16385, 100_003]
)
def test_every_order_is_a_permutation(size: int, version: int) -> None:
    assert sorted(order(size, 3, 4, version)) == list(range(size))


@pytest.mark.parametrize("size", BORDERS)
def test_no_integer_overflows(size: int) -> None:
    """Positions at both ends, and beyond the end, where the order begins again."""
    for begin in (0, size // 2, size - 1000):
        found = at(size, begin, 1, 1000)
        assert len(set(found)) == 1000 and 0 <= min(found) <= max(found) < size
    assert at(size, size - 10, 7, 4) == [*at(size, size - 10, 7, 2), *at(size, 4, 7, 2)]
    assert at(size, size, 1, 3) == at(size, 0, 1, 3)
    own = Order(size, None, 0, 2).samples(size - 2, 1, 3).tolist()
    assert own == [size - 2, size - 1, 0]


def test_orders_differ_by_seed_and_epoch() -> None:
    for size in (64, 5000):
        orders = {tuple(order(size, seed, epoch)) for seed in range(-3, 8) for epoch in range(9)}
        assert len(orders) == 11 * 9


@pytest.mark.parametrize("world_size", [1, 2, 7, 64])
@pytest.mark.parametrize("start", [0, 1, 123_456_789])
def test_ranks_of_any_number_walk_one_order_of_a_thousand_million(
    world_size: int, start: int
) -> None:
    """Across the blocks in which the samples are computed."""
    turns, size = 20_000 // world_size, 10**9
    shares = []
    for rank in range(world_size):
        sampler = ElasticSampler(Sized(size), world_size, rank, seed=3)
        sampler.set_position(1, start)
        shares.append(list(islice(sampler, turns)))
    taken = [index for turn in zip(*shares, strict=True) for index in turn]
    assert taken == at(size, start, 1, turns * world_size)


@pytest.mark.parametrize("size", [10**9, 2**63 - 1])
def test_memory_does_not_grow_with_the_data_set(size: int) -> None:
    sampler = ElasticSampler(Sized(size), 8, 5, seed=1)
    list(islice(sampler, 10))
    tracemalloc.start()
    try:
        next(iter(sampler))
        assert tracemalloc.get_traced_memory()[1] < 100_000  # bytes
        for _ in islice(sampler, 100_000):
            pass
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()
    assert len(sampler) == -(-size // 8)
