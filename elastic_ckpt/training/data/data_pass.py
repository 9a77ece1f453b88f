"""The pass over the data that a script's own loop is in, from its sampler and its steps.

``save_checkpoint`` receives a step and a batch size, and scripts count steps in many ways: since
the job began, since the epoch began, in micro-batches. So the position in the data follows from
where the sampler began and what the steps since then used; the script's numbers only have to agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from elastic_ckpt.checkpoint.manifest import ORDER_VERSION
from elastic_ckpt.errors import DataMismatch, UsageError


@dataclass
class DataPass:
    """One pass over an epoch's remaining data.

    Attributes:
        begin: samples of the order that were used before, on all ranks together.
        replicas: ranks among which the order is divided.
        length: samples of this rank.
        owner: the ``id`` of the sampler.
        steps_before: steps of this epoch before the pass began.
        drawn: samples that the loader has requested; with workers it is ahead of the steps.
        steps: optimizer steps since the pass began.
    """

    epoch: int
    begin: int
    size: int
    replicas: int
    length: int
    order_seed: int | None = None
    owner: int = 0
    steps_before: int = 0
    drawn: int = 0
    steps: int = 0
    _drawn_first: int = 0

    def stepped(self) -> None:
        """Count a finished optimizer step."""
        self.steps += 1
        if self.steps == 1:
            self._drawn_first = self.drawn

    @property
    def taken(self) -> int:
        """Samples that the loaders have drawn, on all ranks together; ahead of the steps."""
        return min(self.begin + self.drawn * self.replicas, self.size)

    def used(self, epoch: int, batch_size: int) -> int:
        """Return the samples of the order used by now, on all ranks together. UsageError if the
        script's epoch, or its samples per optimizer step of one rank, contradict the sampler."""
        if epoch != self.epoch:
            raise UsageError(
                f"save_checkpoint received epoch {epoch}, but the sampler is in epoch "
                f"{self.epoch}: start the loop at the epoch that load_checkpoint returned"
            )
        if not self.steps:
            if self.drawn < self.length:
                raise UsageError(
                    "call should_save(step) after every optimizer step: without it the number of "
                    "samples used in this epoch is unknown"
                )
            return self.size
        taken = (self.steps - 1) * batch_size
        if self.drawn < self.length and self.drawn - self._drawn_first != taken:
            real = (self.drawn - self._drawn_first) / (self.steps - 1) if self.steps > 1 else 0
            raise UsageError(
                f"save_checkpoint received batch_size={batch_size}, but a step uses {real:g} "
                "samples of each rank: pass the batch size times the accumulation, and call "
                "should_save once per optimizer step"
            )
        return min(self.begin + self.steps * batch_size * self.replicas, self.size)


@dataclass
class Resumed:
    """The position of the checkpoint that this process has loaded.

    Attributes:
        samples, steps: used in this epoch; samples on all ranks together.
        size, order_seed: of the data; size is 0 if they are unknown.
        order_version: of the job's order, in this epoch and all later ones.
    """

    epoch: int
    samples: int
    steps: int = 0
    size: int = 0
    order_seed: int | None = None
    order_version: int = ORDER_VERSION

    def per_rank(self, replicas: int) -> int:
        """Return ColossalChat's unit, rounded down if the ranks do not divide the samples."""
        return self.samples // replicas

    def check(self, size: int, order_seed: int | None) -> None:
        """Raise DataMismatch unless a sampler has the same data in the same order."""
        if self.size and (self.size, self.order_seed) != (size, order_seed):
            raise DataMismatch(
                f"the checkpoint was made with {self.size} samples in the order of seed "
                f"{self.order_seed}, but the sampler has {size} and seed {order_seed}: use the "
                "same data and seed, or start over with a new --dir"
            )


@dataclass
class PassTracker:
    """The passes of this process.

    Attributes:
        current: the pass in progress, or the last one.
        resumed: where the next pass begins, until a sampler takes it.
        order_version: of the order of the checkpoint that was loaded; None without one.
        on_begin: called when a pass begins.
    """

    current: DataPass | None = None
    resumed: Resumed | None = None
    order_version: int | None = None
    on_begin: Callable[[], None] = lambda: None


tracker = PassTracker()
"""One for the process, which trains one model."""


def begin_pass(found: DataPass) -> None:
    """Note that a sampler is read for training from now on; UsageError if another sampler's pass is
    not finished."""
    now = tracker.current
    if now is not None and now.owner != found.owner:
        is_over = now.drawn == now.length and now.epoch != found.epoch
        if not is_over:
            raise UsageError(
                "two samplers are read for training at the same time: read the one for evaluation "
                "under torch.no_grad()"
            )
    tracker.current = found
    tracker.on_begin()


def current_pass() -> DataPass | None:
    """Return the pass in progress, or the last one."""
    return tracker.current


def order_version(default: int = ORDER_VERSION) -> int:
    """Return the version of the order of the checkpoint that was loaded, else ``default``."""
    return tracker.order_version or default


def resume_at(place: Resumed | None, on_begin: Callable[[], None]) -> None:
    """Set where the next pass begins, and what to call there, once."""

    def once() -> None:
        tracker.on_begin = lambda: None
        on_begin()

    tracker.current = None
    tracker.resumed = place
    tracker.order_version = place.order_version if place is not None else None
    tracker.on_begin = once


def resumed() -> Resumed | None:
    """Return where the next pass begins; None once a sampler took it."""
    return tracker.resumed


def take_resumed() -> Resumed | None:
    """Return where the next pass begins, for the sampler that begins there."""
    place, tracker.resumed = tracker.resumed, None
    return place
