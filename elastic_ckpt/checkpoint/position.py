"""Where in the data a job is, independent of the world size."""

from __future__ import annotations

import msgspec


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
