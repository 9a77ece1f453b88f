"""The order of samples and every rank's share of it, across any sequence of world sizes."""

import inspect
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from elastic_ckpt.errors import UsageError
from elastic_ckpt.training.data.sampler import ElasticSampler, epoch_order

MASK = (1 << 64) - 1


# -- the order ----------------------------------------------------------------------------------


def mix(value: int) -> int:
    """SplitMix64's finalizer, in plain integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def order_in_plain_integers(size: int, seed: int, epoch: int) -> list[int]:
    golden = 0x9E3779B97F4A7C15
    key = mix((mix((seed & MASK) + golden & MASK) ^ epoch) + golden & MASK)
    hashes = [mix((index + 1) * golden + key & MASK) for index in range(size)]
    signed = [value - (1 << 64) if value >> 63 else value for value in hashes]
    return sorted(range(size), key=lambda index: signed[index])


@pytest.mark.parametrize(
    ("size", "seed", "epoch", "order"),
    [
        (12, 5, 0, [2, 4, 5, 0, 10, 6, 1, 8, 3, 9, 11, 7]),
        (12, 5, 1, [2, 5, 0, 8, 4, 1, 9, 7, 6, 11, 10, 3]),
        (12, -1, 0, [3, 2, 10, 5, 4, 0, 6, 11, 1, 8, 7, 9]),
        (12, 2**63 + 7, 3, [7, 11, 10, 6, 4, 5, 0, 1, 3, 9, 8, 2]),
        (1, 0, 0, [0]),
    ],
)
def test_an_order_never_changes_between_versions(size, seed, epoch, order):
    assert epoch_order(size, seed, epoch).tolist() == order


@pytest.mark.parametrize(("size", "seed", "epoch"), [(257, 0, 0), (500, 123456789, 41), (3, -9, 2)])
def test_the_order_is_the_one_that_is_documented(size, seed, epoch):
    assert epoch_order(size, seed, epoch).tolist() == order_in_plain_integers(size, seed, epoch)


@pytest.mark.parametrize("size", [1, 2, 97, 1000, 4096])
def test_every_order_is_a_permutation(size):
    order = epoch_order(size, 3, 4)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(size))


def test_orders_differ_by_seed_and_epoch():
    orders = {
        tuple(epoch_order(64, seed, epoch).tolist()) for seed in range(-3, 8) for epoch in range(9)
    }
    assert len(orders) == 11 * 9


def test_orders_are_scattered():
    """Every sample comes first about equally often."""
    firsts = Counter(epoch_order(10, 0, epoch)[0].item() for epoch in range(2000))
    assert len(firsts) == 10
    assert 140 < min(firsts.values()) <= max(firsts.values()) < 260


def test_the_order_draws_from_no_generator():
    before = torch.get_rng_state()
    list(ElasticSampler(range(50), 1, 0, seed=3))
    assert torch.equal(before, torch.get_rng_state())


# -- shares -------------------------------------------------------------------------------------


def interleaved(samplers: list[ElasticSampler]) -> list[int]:
    """What the ranks take, in the order of their turns."""
    return [index for turn in zip(*samplers, strict=True) for index in turn]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_the_order_is_independent_of_the_world_size(world_size, drop_last):
    size = 61
    samplers = [
        ElasticSampler(range(size), world_size, rank, seed=8, drop_last=drop_last)
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(2)
    taken = interleaved(samplers)
    order = epoch_order(size, 8, 2).tolist()
    assert taken[:size] == order[: len(taken)]
    if drop_last:
        assert size - world_size < len(taken) <= size
    else:
        assert size <= len(taken) < size + world_size
        assert taken[size:] == order[: len(taken) - size]  # padded with the first ones


def epoch_with_resizes(
    size: int, batch: int, worlds: list[tuple[int, int]], drop_last: bool
) -> tuple[list[int], int]:
    """One epoch in which ``(world size, steps)`` follow each other, the last one to the end.

    Returns:
        The samples used, by all ranks, and the world size at the end.
    """
    used: list[int] = []
    position = 0
    for turn, (world_size, steps) in enumerate(worlds):
        shares = []
        for rank in range(world_size):
            sampler = ElasticSampler(range(size), world_size, rank, seed=4, drop_last=drop_last)
            sampler.set_position(6, position)
            share = list(sampler)
            assert len(sampler) == len(share)
            shares.append(share)
        taken = None if turn == len(worlds) - 1 else steps * batch
        for share in shares:
            used += share[:taken]
        if taken is None:
            return used, world_size
        position = min(position + steps * batch * world_size, size)
    raise AssertionError("no world size")


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("size", [1, 5, 48, 101])
@pytest.mark.parametrize(
    "worlds",
    [
        [(4, 2), (2, 1), (3, 2), (1, 1), (4, 0)],
        [(1, 1), (5, 0)],
        [(2, 3), (1, 0)],
        [(3, 1), (3, 1), (3, 0)],
        [(8, 1), (1, 0)],
        [(1, 0), (7, 0), (2, 0)],
    ],
)
def test_resizes_at_any_step_use_each_sample_once(size, batch, worlds, drop_last):
    # A resize happens at a boundary between steps that are whole on all ranks: an earlier world
    # that would run into the end of the epoch is the last one.
    position = 0
    possible = []
    for world_size, steps in worlds[:-1]:
        possible.append((world_size, steps))
        position += steps * batch * world_size
        if position > size:
            break
    else:
        possible.append(worlds[-1])
    used, last = epoch_with_resizes(size, batch, possible, drop_last)
    counts = Counter(used)
    if drop_last:
        assert max(counts.values(), default=1) == 1
        assert size - len(used) < last
    else:
        assert set(counts) == set(range(size))
        assert len(used) - size < last


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_length_is_what_iteration_yields_at_every_position(world_size, drop_last):
    size = 23
    order = epoch_order(size, 0, 1).tolist()
    for position in range(size + world_size):
        lengths = set()
        for rank in range(world_size):
            sampler = ElasticSampler(range(size), world_size, rank, drop_last=drop_last)
            sampler.set_position(1, position)
            share = list(sampler)
            assert len(share) == len(sampler)
            assert set(share) <= set(order[position:] + order[:world_size])
            lengths.add(len(share))
        assert len(lengths) == 1  # alike on all ranks


@pytest.mark.parametrize("batch", [1, 4, 6])
@pytest.mark.parametrize("drop_last", [False, True])
def test_loader_length_matches_its_batches(batch, drop_last):
    data = torch.arange(22)
    sampler = ElasticSampler(data, 2, 1, seed=1, drop_last=drop_last)
    loader = DataLoader(data, batch_size=batch, sampler=sampler, drop_last=drop_last)
    for position in (0, 4, 7, 21, 22):
        sampler.set_position(0, position)
        assert len(list(loader)) == len(loader)


def test_more_replicas_than_samples_are_padded_alike():
    samplers = [ElasticSampler(range(2), 7, rank, shuffle=False) for rank in range(7)]
    assert [list(sampler) for sampler in samplers] == [[0], [1], [0], [1], [0], [1], [0]]
    dropping = [ElasticSampler(range(2), 7, rank, drop_last=True) for rank in range(7)]
    assert [list(sampler) for sampler in dropping] == [[]] * 7


# -- arguments ----------------------------------------------------------------------------------


def test_it_takes_the_arguments_of_a_distributed_sampler():
    """By position and by name, because plugins pass either."""

    def arguments(kind):
        parameters = list(inspect.signature(kind.__init__).parameters.values())
        return [(p.name, p.default) for p in parameters if p.name != "self"]

    assert arguments(ElasticSampler) == arguments(DistributedSampler)
    ours = ElasticSampler(range(10), 3, 2, False, 7, True)
    theirs = DistributedSampler(range(10), 3, 2, False, 7, True)
    assert list(ours) == list(theirs) == [2, 5, 8]
    for name in ("num_replicas", "rank", "shuffle", "seed", "drop_last", "epoch"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("size", [1, 10, 11])
def test_without_shuffling_it_pads_as_a_distributed_sampler_does(size):
    for rank in range(4):
        ours = ElasticSampler(range(size), 4, rank, shuffle=False)
        theirs = DistributedSampler(range(size), 4, rank, shuffle=False)
        assert list(ours) == list(theirs)


def test_a_single_rank_gets_everything():
    sampler = ElasticSampler(range(9))
    assert (sampler.num_replicas, sampler.rank) == (1, 0)
    assert list(sampler) == epoch_order(9, 0, 0).tolist()


def test_the_order_seed_is_none_for_the_data_sets_own_order():
    assert ElasticSampler(range(3), seed=0).order_seed == 0
    assert ElasticSampler(range(3), shuffle=False, seed=4).order_seed is None


def test_a_new_epoch_begins_at_its_first_sample():
    sampler = ElasticSampler(range(12), seed=5)
    sampler.set_position(0, 7)
    assert list(sampler) == epoch_order(12, 5, 0).tolist()[7:]
    sampler.set_epoch(1)
    assert list(sampler) == epoch_order(12, 5, 1).tolist()


def test_the_end_of_a_padded_epoch_is_the_end():
    sampler = ElasticSampler(range(10), 4, 0)
    sampler.set_position(0, 12)
    assert list(sampler) == []


@pytest.mark.parametrize(("epoch", "index"), [(-1, 0), (0, -1)])
def test_an_invalid_position_is_rejected_and_nothing_changes(epoch, index):
    sampler = ElasticSampler(range(10), seed=5)
    sampler.set_position(3, 4)
    with pytest.raises(UsageError, match=f"epoch {epoch}, sample {index}"):
        sampler.set_position(epoch, index)
    assert (sampler.epoch, sampler.sample_start_index) == (3, 4)


@pytest.mark.parametrize(("replicas", "rank"), [(2, 2), (2, -1), (1, 1), (-1, 0)])
def test_an_invalid_rank_is_rejected(replicas, rank):
    with pytest.raises(UsageError, match=f"rank {rank} must be below num_replicas {replicas}"):
        ElasticSampler(range(10), replicas, rank)


def test_an_empty_data_set_is_rejected():
    with pytest.raises(UsageError, match="empty"):
        ElasticSampler([])
