"""A sampler whose position in the data does not depend on the world size.

Ranks stride through what remains after ``sample_start_index`` of one order, so that after any
change of the world size the consumed samples are still a prefix of the same order, and each is used
exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch.distributed as dist
from torch.utils.data import Sampler

from elastic_ckpt.checkpoint.manifest import ORDER_VERSION
from elastic_ckpt.errors import UsageError
from elastic_ckpt.training.data.order import Order

_FIRST_BLOCK: Final = 64
_BLOCK: Final = 16_384
"""Samples that are computed at a time: few first, then as many as stay in a core's cache."""


class ElasticSampler(Sampler[int]):
    """A sampler whose position in the data is one global number.

    Takes the arguments of ``DistributedSampler``, so that
    ``plugin.prepare_dataloader(..., distributed_sampler_cls=ElasticSampler)`` works. The order is
    computed while it is read: memory and start do not depend on the size of the data set.

    ``len()`` counts what an iteration yields from the position on. A Session sets the position when
    ``session.batches`` is called, and to the next epoch when ``session.epochs`` yields that.

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
        self.order_version = ORDER_VERSION
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
        return self.length_from(self.sample_start_index)

    def __iter__(self) -> Iterator[int]:
        return self._share(self.sample_start_index)

    def length_from(self, start: int) -> int:
        """Return how many samples an iteration yields that begins after ``start``."""
        left = self.dataset_size - start
        return left // self.num_replicas if self.drop_last else -(-left // self.num_replicas)

    def _share(self, start: int) -> Iterator[int]:
        """Yield this rank's samples after ``start`` of the order, as it is now."""
        order = Order(self.dataset_size, self.order_seed, self.epoch, self.order_version)
        stride, position, left = self.num_replicas, start + self.rank, self.length_from(start)
        return _read(order, position, stride, left)


def _read(order: Order, position: int, stride: int, left: int) -> Iterator[int]:
    block = _FIRST_BLOCK
    while left:
        count = min(block, left)
        yield from order.samples(position, stride, count).tolist()
        position, left, block = position + count * stride, left - count, min(4 * block, _BLOCK)
