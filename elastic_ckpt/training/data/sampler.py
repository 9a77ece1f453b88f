"""The order of samples: a permutation of (seed, epoch) over the whole data set.

It does not depend on the world size. Ranks stride through what remains after
``sample_start_index``, so that after any change of the world size the consumed samples are still a
prefix of the same order, and each is used exactly once.

The permutation sorts the indices by a 64-bit hash of (seed, epoch, index), Steele, Lea and
Flood's SplitMix64 (2014), rather than by a library's generator: those may change between
versions, and a job's order must not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from elastic_ckpt.errors import UsageError

_GOLDEN: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
_MASK: Final = (1 << 64) - 1


def epoch_order(size: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the order of one epoch: int64, shape ``[size]``, a permutation of ``range(size)``."""
    key = _mix_number(_mix_number(seed & _MASK) ^ (epoch & _MASK))
    index = torch.arange(size, dtype=torch.int64)
    return torch.argsort(_mix((index + 1) * _signed(_GOLDEN) + _signed(key)), stable=True)


class ElasticSampler(Sampler[int]):
    """A sampler whose position in the data is one global number.

    Takes the arguments of ``DistributedSampler``, so that
    ``plugin.prepare_dataloader(..., distributed_sampler_cls=ElasticSampler)`` works.

    Args:
        dataset: anything with a length.
        num_replicas, rank: data-parallel size and rank; taken from torch.distributed if not
            given.
        shuffle: whether the order is permuted.
        seed: seed of the permutation, the same on every rank.
        drop_last: True drops the last samples of the epoch if there are fewer than replicas.
            False repeats the first samples of the order instead, so that all ranks have the same
            number.
    """

    def __init__(
        self,
        dataset: Any,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        self.dataset_size = len(dataset)
        self.num_replicas = num_replicas or (dist.get_world_size() if initialized else 1)
        self.rank = rank if rank is not None else (dist.get_rank() if initialized else 0)
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        self.sample_start_index = 0
        if not 0 <= self.rank < self.num_replicas:
            raise UsageError(f"rank {self.rank} must be below num_replicas {self.num_replicas}")
        if self.dataset_size == 0:
            raise UsageError("the data set is empty")

    @property
    def order_seed(self) -> int | None:
        """The seed of the order, None for the data set's own order."""
        return self.seed if self.shuffle else None

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch at its first sample."""
        self.set_position(epoch, 0)

    def set_position(self, epoch: int, sample_start_index: int) -> None:
        """Begin an epoch after ``sample_start_index`` samples of its order, on all ranks together.

        An index beyond the end means the end: a padded epoch consumes more samples than exist.

        Raises:
            UsageError: one of them is negative.
        """
        if sample_start_index < 0 or epoch < 0:
            raise UsageError(f"invalid position: epoch {epoch}, sample {sample_start_index}")
        self.epoch = epoch
        self.sample_start_index = min(sample_start_index, self.dataset_size)

    def __len__(self) -> int:
        left = self.dataset_size - self.sample_start_index
        if self.drop_last:
            return left // self.num_replicas
        return -(-left // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            order = epoch_order(self.dataset_size, self.seed, self.epoch)
        else:
            order = torch.arange(self.dataset_size)
        left = order[self.sample_start_index :]
        count = len(self) * self.num_replicas
        if count > len(left):
            repeats = -(-(count - len(left)) // len(order))
            left = torch.cat([left, *[order] * repeats])
        yield from left[self.rank : count : self.num_replicas].tolist()


def _mix(value: torch.Tensor) -> torch.Tensor:
    """Apply SplitMix64's finalizer to int64 values as unsigned ones; products wrap."""
    value = (value ^ _shift(value, 30)) * _signed(_FIRST)
    value = (value ^ _shift(value, 27)) * _signed(_SECOND)
    return value ^ _shift(value, 31)


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right logically; torch's own shift keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix_number(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
