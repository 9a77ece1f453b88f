"""A loop that keeps its own shape: its sampler's place, and what a save makes of it."""

from collections.abc import Iterator

import pytest
import torch

from elastic_ckpt import ElasticSampler, StatefulDistributedSampler
from elastic_ckpt.errors import DataMismatch, UsageError
from elastic_ckpt.training.data import data_pass
from elastic_ckpt.training.data.data_pass import Resumed, current_pass, order_version, resume_at
from elastic_ckpt.training.data.order import Order

DATA = range(20)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_pass, "tracker", data_pass.PassTracker())


def sampler(replicas: int = 1, rank: int = 0, **options: object) -> StatefulDistributedSampler:
    return StatefulDistributedSampler(DATA, replicas, rank, **options)  # type: ignore[arg-type]


def order(epoch: int) -> list[int]:
    plain = ElasticSampler(DATA, 1, 0)
    plain.set_epoch(epoch)
    return list(plain)


def test_each_pass_is_the_next_epoch() -> None:
    plain = sampler()
    assert [list(plain) for _ in range(3)] == [order(0), order(1), order(2)]


def test_set_epoch_names_the_next_pass() -> None:
    named = sampler()
    for epoch in (4, 4, 7):
        named.set_epoch(epoch)
        assert list(named) == order(epoch)


def test_a_start_index_is_for_one_pass() -> None:
    resumed = sampler()
    resumed.set_start_index(15)
    assert len(resumed) == 5
    assert list(resumed) == order(0)[15:]
    assert list(resumed) == order(1)


def test_the_length_is_that_of_the_pass_until_another_one_is_named() -> None:
    resumed = sampler()
    resumed.set_start_index(15)
    assert list(resumed) == order(0)[15:]
    assert len(resumed) == 5  # the loop may still have batches in hand
    resumed.set_epoch(1)
    assert len(resumed) == 20
    assert list(resumed) == order(1)


def test_before_the_first_pass_the_length_is_what_is_left_of_the_epoch() -> None:
    resume_at(Resumed(epoch=2, samples=14, size=20, order_seed=0), lambda: None)
    resumed, other = sampler(), sampler()
    assert (len(resumed), len(other)) == (6, 6)
    assert len(list(resumed)) == len(resumed) == 6
    assert len(other) == 20


def test_the_length_of_an_evaluation_is_that_of_all_samples() -> None:
    training = sampler()
    training.set_start_index(15)
    with torch.no_grad():
        assert len(training) == len(list(training)) == 20
    assert len(training) == len(list(training)) == 5


@pytest.mark.parametrize("version", [1, 2])
def test_all_passes_after_a_load_have_the_order_of_the_checkpoint(version: int) -> None:
    """Also those of a sampler that the script makes later."""
    size = 5000
    resume_at(Resumed(2, 4990, 0, size, 0, version), lambda: None)
    first = StatefulDistributedSampler(range(size), 1, 0)
    for epoch in (2, 3):
        expected = Order(size, 0, epoch, version).samples(0, 1, size).tolist()
        assert list(first) == expected[4990 if epoch == 2 else 0 :]
    later = StatefulDistributedSampler(range(size), 1, 0)
    later.set_epoch(4)
    assert list(later) == Order(size, 0, 4, version).samples(0, 1, size).tolist()
    assert order_version() == version


@pytest.mark.parametrize("calls", ["nothing", "epoch", "index", "epoch, index", "index, epoch"])
def test_the_first_pass_resumes_whatever_the_script_sets(calls: str) -> None:
    resume_at(Resumed(epoch=2, samples=14), lambda: None)
    found = sampler()
    for call in calls.split(", "):
        if call == "epoch":
            found.set_epoch(2)
        elif call == "index":
            found.set_start_index(14)
    assert list(found) == order(2)[14:]
    assert list(found) == order(3)


def test_a_position_that_the_ranks_do_not_divide_is_exact() -> None:
    """14 samples were used; three ranks have used 4 2/3 of them each."""
    used: list[int] = []
    for rank in range(3):
        resume_at(Resumed(epoch=0, samples=14), lambda: None)
        one = sampler(3, rank)
        one.set_start_index(Resumed(0, 14).per_rank(3))
        used += list(one)
    assert sorted(used) == sorted(order(0)[14:])


@pytest.mark.parametrize("options", [{"seed": 1}, {"shuffle": False}])
def test_other_data_or_another_order_is_an_error(options: dict[str, object]) -> None:
    for size in (20, 21):
        resume_at(Resumed(epoch=1, samples=3, size=size, order_seed=0), lambda: None)
        with pytest.raises(DataMismatch, match=f"made with {size} samples in the order of seed 0"):
            next(iter(sampler(**options)))


def test_the_steps_of_an_epoch_continue() -> None:
    resume_at(Resumed(epoch=1, samples=6, steps=3, size=20, order_seed=0), lambda: None)
    found = sampler()
    assert list(found) == order(1)[6:]
    assert current_pass().steps_before == 3  # type: ignore[union-attr]
    list(found)
    assert current_pass().steps_before == 0  # type: ignore[union-attr]


def test_an_evaluation_is_complete_and_does_not_move_the_position() -> None:
    training, evaluation = sampler(), sampler(shuffle=False)
    training.set_start_index(3)
    reading = iter(training)
    next(reading)
    with torch.no_grad():
        assert list(evaluation) == list(DATA)
        assert list(evaluation) == list(DATA)
    assert next(reading) == order(0)[4]
    assert current_pass().drawn == 2  # type: ignore[union-attr]


def test_the_random_state_is_restored_once_when_the_first_pass_begins() -> None:
    began: list[int] = []
    resume_at(None, lambda: began.append(1))
    found = sampler()
    assert began == []
    list(found)
    list(found)
    assert began == [1]


def steps(batch: int, ahead: int = 0, replicas: int = 1) -> Iterator[data_pass.DataPass]:
    """A loop of full batches, with a loader that is this many batches ahead."""
    reading = iter(sampler(replicas))
    length = 20 // replicas
    drawn = 0
    for step in range(length // batch):
        while drawn < min((step + 1 + ahead) * batch, length):
            next(reading)
            drawn += 1
        now = current_pass()
        assert now is not None
        now.stepped()
        yield now


@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
@pytest.mark.parametrize("replicas", [1, 2])
def test_the_position_follows_from_the_steps_however_far_the_loader_is_ahead(
    ahead: int, replicas: int
) -> None:
    for step, now in enumerate(steps(2, ahead, replicas), 1):
        assert now.used(epoch=0, batch_size=2) == step * 2 * replicas


def test_a_short_last_step_ends_the_epoch() -> None:
    reading = list(sampler())
    now = current_pass()
    assert now is not None and reading
    for _ in range(3):
        now.stepped()
    assert now.used(epoch=0, batch_size=8) == 20


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_batch_size_that_the_loader_contradicts_is_an_error(ahead: int, batch_size: int) -> None:
    """Micro-batches for steps, or an accumulation that was left out."""
    for step, now in enumerate(steps(2, ahead), 1):
        if 1 < step < 5:
            with pytest.raises(
                UsageError, match=f"batch_size={batch_size}, but a step uses 2 samples"
            ):
                now.used(epoch=0, batch_size=batch_size)


def test_an_epoch_that_the_sampler_is_not_in_is_an_error() -> None:
    for now in steps(2):
        with pytest.raises(UsageError, match="received epoch 1, but the sampler is in epoch 0"):
            now.used(epoch=1, batch_size=2)


def test_a_save_within_an_epoch_needs_counted_steps() -> None:
    next(iter(sampler()))
    with pytest.raises(UsageError, match="call should_save"):
        current_pass().used(epoch=0, batch_size=1)  # type: ignore[union-attr]


def test_a_save_at_an_epochs_end_does_not_need_the_steps() -> None:
    list(sampler())
    assert current_pass().used(epoch=0, batch_size=1) == 20  # type: ignore[union-attr]


def test_two_samplers_at_a_time_are_an_error() -> None:
    training, evaluation = sampler(), sampler()
    next(iter(training))
    with pytest.raises(UsageError, match=r"under torch\.no_grad"):
        next(iter(evaluation))


def test_another_sampler_for_the_next_epoch_is_accepted() -> None:
    first, second = sampler(), sampler()
    list(first)
    second.set_epoch(1)
    assert list(second) == order(1)


class Group:
    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def size(self) -> int:
        return self._ranks


@pytest.mark.parametrize(
    ("plugin", "replicas"),
    [
        ({}, 8),  # TorchDDP, TorchFSDP, LowLevelZero
        ({"dp_size": 4}, 4),  # Gemini with tp_size=2
        ({"pp_group": Group(2), "dp_group": Group(2), "dp_size": 4}, 2),  # sp_size=2
    ],
)
def test_replicas_are_the_shares_of_the_plugins_own_loader(
    plugin: dict[str, object], replicas: int
) -> None:
    from types import SimpleNamespace

    from elastic_ckpt.training.functions import _data_parallel_size

    booster = SimpleNamespace(plugin=SimpleNamespace(**plugin))
    assert _data_parallel_size(booster, 8) == replicas
    assert _data_parallel_size(None, 8) == 8
