"""The order of samples and every rank's share of it, across any sequence of world sizes."""

import inspect
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from elastic_ckpt.errors import UsageError
from elastic_ckpt.training.data.order import Order
from elastic_ckpt.training.data.sampler import ElasticSampler


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    return Order(size, seed, epoch, 2).samples(0, 1, size).tolist()


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
@pytest.mark.parametrize("size", [61, 5003])
def test_the_order_is_independent_of_the_world_size(size, world_size, drop_last):
    samplers = [
        ElasticSampler(range(size), world_size, rank, seed=8, drop_last=drop_last)
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(2)
    taken = interleaved(samplers)
    order = epoch_order(size, 8, 2)
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
@pytest.mark.parametrize("size", [1, 2, 3, 5, 48, 101, 4097])
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
@pytest.mark.parametrize("size", [23, 4100])
def test_length_is_what_iteration_yields_at_every_position(size, world_size, drop_last):
    order = epoch_order(size, 0, 1)
    for position in (*range(23 + world_size), *range(size - 12, size + world_size)):
        lengths = set()
        for rank in range(world_size):
            sampler = ElasticSampler(range(size), world_size, rank, drop_last=drop_last)
            sampler.set_position(1, position)
            share = list(sampler)
            assert len(share) == len(sampler)
            assert set(share) <= {*order[position:], *order[:world_size]}
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
    assert list(sampler) == epoch_order(9, 0, 0)


def test_the_order_seed_is_none_for_the_data_sets_own_order():
    assert ElasticSampler(range(3), seed=0).order_seed == 0
    assert ElasticSampler(range(3), shuffle=False, seed=4).order_seed is None


def test_a_new_epoch_begins_at_its_first_sample():
    sampler = ElasticSampler(range(12), seed=5)
    sampler.set_position(0, 7)
    assert list(sampler) == epoch_order(12, 5, 0)[7:]
    sampler.set_epoch(1)
    assert list(sampler) == epoch_order(12, 5, 1)


def test_an_iteration_keeps_the_position_at_which_it_began():
    sampler = ElasticSampler(range(5000), 2, 1, seed=5)
    reading = iter(sampler)
    first = next(reading)
    sampler.set_position(3, 40)
    assert [first, *reading] == epoch_order(5000, 5, 0)[1::2]


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
