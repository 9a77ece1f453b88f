"""Where in the data a session is."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ckpt.checkpoint.manifest import SealHeader
from elastic_ckpt.checkpoint.position import Position


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
