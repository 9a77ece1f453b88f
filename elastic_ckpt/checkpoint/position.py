"""Where in the data a job is, independent of the world size."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from elastic_ckpt.checkpoint.manifest import SealHeader


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """Place in the data at a step boundary.

    Attributes:
        epoch: epochs begun before this one.
        step: optimizer steps finished since the job began.
        step_in_epoch: optimizer steps finished in this epoch.
        sample_start_index: samples of this epoch consumed by all ranks together.
        order_seed: seed of the order of samples; None where no sampler was seen.
        dataset_fingerprint: digest of the data set; empty where no data set was seen.
        dataset_size: samples in the data set; 0 where no data set was seen.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    sample_start_index: int = 0
    order_seed: int | None = None
    dataset_fingerprint: str = ""
    dataset_size: int = 0


@dataclass
class Place:
    """What :class:`Position` freezes at a save; counts as that does."""

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    samples: int = 0
    order_seed: int | None = None
    fingerprint: str = ""
    dataset_size: int = 0

    @classmethod
    def of(cls, seal: SealHeader) -> Place:
        """Where a checkpoint was made."""
        return cls(
            epoch=seal.epoch,
            step=seal.step,
            step_in_epoch=seal.step_in_epoch,
            samples=seal.sample_start_index,
            order_seed=seal.order_seed,
            fingerprint=seal.dataset_fingerprint,
            dataset_size=seal.dataset_size,
        )

    def count_step(self, samples: int) -> None:
        """A step is finished, with so many samples on all ranks together; the last may be short."""
        self.step += 1
        self.step_in_epoch += 1
        self.samples = min(self.samples + samples, self.dataset_size)

    def next_epoch(self) -> None:
        """The epoch is over."""
        self.epoch += 1
        self.step_in_epoch = 0
        self.samples = 0

    def freeze(self) -> Position:
        """As it stands in a manifest."""
        return Position(
            epoch=self.epoch,
            step=self.step,
            step_in_epoch=self.step_in_epoch,
            sample_start_index=self.samples,
            order_seed=self.order_seed,
            dataset_fingerprint=self.fingerprint,
            dataset_size=self.dataset_size,
        )
