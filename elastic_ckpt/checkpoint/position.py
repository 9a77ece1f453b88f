"""Where in the data a job is, independent of the world size."""

from __future__ import annotations

import msgspec

from elastic_ckpt.checkpoint.manifest import ORDER_VERSION, SealHeader


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """A position in the data at a step boundary.

    Attributes:
        epoch: epochs started before this one.
        step: optimizer steps finished since the job started.
        step_in_epoch: optimizer steps finished in this epoch.
        sample_start_index: samples of this epoch consumed by all ranks together.
        order_seed: seed of the order of samples; None without a sampler.
        order_version: how the order is computed; a job keeps that of its first checkpoint.
        dataset_fingerprint: digest of the data set; empty without a data set.
        dataset_size: samples in the data set; 0 without a data set.
        dataset_fields: digests of the fields of some of its samples, by name; may be empty.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    sample_start_index: int = 0
    order_seed: int | None = None
    order_version: int = ORDER_VERSION
    dataset_fingerprint: str = ""
    dataset_size: int = 0
    dataset_fields: dict[str, str] = {}

    @classmethod
    def of(cls, seal: SealHeader) -> Position:
        """Return where a checkpoint was made."""
        return cls(**{name: getattr(seal, name) for name in cls.__struct_fields__})

    def advance(self, samples: int) -> Position:
        """Return the position one step later; ``samples`` are of that step, on all ranks
        together."""
        used = self.sample_start_index + samples
        return msgspec.structs.replace(
            self,
            step=self.step + 1,
            step_in_epoch=self.step_in_epoch + 1,
            sample_start_index=min(used, self.dataset_size) if self.dataset_size else used,
        )

    def next_epoch(self) -> Position:
        """Return the position at the start of the next epoch."""
        return msgspec.structs.replace(
            self, epoch=self.epoch + 1, step_in_epoch=0, sample_start_index=0
        )
