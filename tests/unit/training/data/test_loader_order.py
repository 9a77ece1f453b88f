"""A loader's order, read again from the random state that it was drawn from."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from elastic_ckpt import ElasticSampler
from elastic_ckpt.training.data.loader_order import LoaderOrder

DATA = TensorDataset(torch.arange(11))


def loader(**options) -> DataLoader:
    return DataLoader(DATA, **{"batch_size": 2, "shuffle": True} | options)


def read(source) -> list:
    return [batch[0].tolist() for batch in source]


@pytest.mark.parametrize("options", [{}, {"batch_size": None}, {"num_workers": 1}])
def test_the_rest_of_an_epoch_is_read_in_the_order_that_began(options: dict) -> None:
    source = loader(**options)
    order = LoaderOrder.of(source)
    whole = read(source)
    begun = order.begun
    torch.manual_seed(99)
    again = loader(**options)
    resumed = LoaderOrder.of(again)
    resumed.resume(begun, 3)
    assert len(again) == len(whole)
    assert read(again) == whole[3:]
    assert read(again) != whole  # the next epoch has an order of its own


def test_generators_are_put_back() -> None:
    source = loader(generator=torch.Generator().manual_seed(5))
    order = LoaderOrder.of(source)
    read(source)
    between = order.state()
    second, begun = read(source), order.begun
    again = loader(generator=torch.Generator())
    resumed = LoaderOrder.of(again)
    resumed.restore(between)
    assert read(again) == second
    resumed.resume(begun, 4)
    assert read(again) == second[4:]


def test_reading_again_draws_nothing() -> None:
    source = loader()
    order = LoaderOrder.of(source)
    read(source)
    order.resume(order.begun, 1)
    iterator = iter(source)
    before = torch.get_rng_state()
    next(iterator)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_elastic_order_continues_after_samples_that_fill_no_batch(workers: int) -> None:
    sampler = ElasticSampler(DATA, num_replicas=1, rank=0, seed=1)
    order = list(sampler)
    source = loader(sampler=sampler, shuffle=None, num_workers=workers)
    resumed = LoaderOrder.of(source)
    assert resumed.resume_after(0, 5) == 3
    assert len(source) == 6  # of a whole epoch, as the library has to count
    sampler.set_epoch(0)
    assert [number for batch in read(source) for number in batch] == order[5:]
    assert [number for batch in read(source) for number in batch] == order


def test_names_of_orders_that_any_number_of_ranks_shares() -> None:
    def name(sampler=None, **options) -> str:
        return LoaderOrder.of(DataLoader(DATA, sampler=sampler, **options)).name

    two = {"num_replicas": 2, "rank": 1}
    assert name(ElasticSampler(DATA, **two)) == name(ElasticSampler(DATA), batch_size=None)
    assert name(DistributedSampler(DATA, **two)) == "shuffled"
    assert name(DistributedSampler(DATA, shuffle=False, **two)) == name() == "sequential"
    assert name(shuffle=True) == name([1, 2]) == ""


def test_a_loader_is_taken_over_once() -> None:
    source = loader()
    LoaderOrder.of(source)
    LoaderOrder.of(source)
    assert not isinstance(source.batch_sampler._inner, LoaderOrder)


def test_streams_and_stateful_loaders_are_left_alone() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    class Stateful(DataLoader):
        def state_dict(self):
            return {}

    assert LoaderOrder.of(DataLoader(Stream())) is None
    assert LoaderOrder.of(Stateful(DATA)) is None
    assert LoaderOrder.of([1, 2]) is None
