"""ColossalChat's sampler, with an exact position in every epoch and for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from elastic_ckpt.training.data.data_pass import (
    DataPass,
    begin_pass,
    order_version,
    resumed,
    take_resumed,
)
from elastic_ckpt.training.data.sampler import ElasticSampler


class StatefulDistributedSampler(ElasticSampler):
    """A replacement for ColossalChat's class of the same name, for scripts with their own loop.

    After ``load_checkpoint`` the first pass resumes where the checkpoint was made, whether or not
    ``set_start_index`` is called; later passes begin at the start. Without ``set_epoch`` each pass
    is the next epoch. ``len()`` is that of the current pass until the next one begins or is
    named, because a loader with workers finishes reading the sampler before the loop ends; before
    the first pass after ``load_checkpoint``, what is left of the epoch.
    Reading under ``torch.no_grad()`` is an evaluation: always complete, and without effect on the
    training's position.
    """

    _is_used = False
    _is_placed = False
    _steps_before = 0

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch of the next pass. The start index of that epoch is kept."""
        if epoch != self.epoch or self._is_used:
            self.set_position(epoch, 0)

    def set_position(self, epoch: int, sample_start_index: int) -> None:
        """Begin an epoch as :class:`ElasticSampler` does."""
        self._is_used = False
        self._steps_before = 0
        super().set_position(epoch, sample_start_index)

    def set_start_index(self, start_index: int) -> None:
        """Begin the next pass after ``start_index`` samples of each rank.

        The index that ``load_checkpoint`` returned means the checkpoint's exact position, even if
        the number of ranks changed and does not divide it.
        """
        place = resumed()
        if place is not None and place.per_rank(self.num_replicas) == start_index:
            self._resume()
        else:
            self.set_position(self.epoch, start_index * self.num_replicas)
            self._is_placed = True

    def __len__(self) -> int:
        if not torch.is_grad_enabled():
            return self.length_from(0)
        place = None if self._is_used or self._is_placed else resumed()
        return super().__len__() if place is None else self.length_from(place.samples)

    def __iter__(self) -> Iterator[int]:
        self.order_version = order_version(self.order_version)
        if not torch.is_grad_enabled():
            yield from self._share(0)
            return
        if self._is_used:
            self.set_position(self.epoch + 1, 0)
        elif not self._is_placed:
            self._resume()
        self._is_used = self._is_placed = True
        found = DataPass(
            self.epoch,
            self.sample_start_index,
            self.dataset_size,
            self.num_replicas,
            len(self),
            self.order_seed,
            owner=id(self),
            steps_before=self._steps_before,
        )
        begin_pass(found)
        for index in self._share(self.sample_start_index):
            found.drawn += 1
            yield index

    def _resume(self) -> None:
        place = take_resumed()
        if place is not None:
            place.check(self.dataset_size, self.order_seed)
            self.set_position(place.epoch, place.samples)
            self._steps_before = place.steps
            self._is_placed = True
