"""The pass over the data that a script's own loop is in, as its sampler and its steps tell it.

``save_checkpoint`` is given a step and a batch size, and scripts count steps in many ways: since
the job began, since the epoch began, in micro-batches. So the place in the data is what the
sampler began at, and what the steps since then used; the script's numbers only have to agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from elastic_ckpt.errors import DataMismatch, UsageError


@dataclass
class DataPass:
    """One epoch's pass, from where it began.

    Attributes:
        epoch: the epoch, as the sampler has it.
        begin: samples of its order that were used before, all ranks together.
        size: samples of the data set.
        replicas: ranks that share the order out.
        length: samples that this rank gets.
        owner: the ``id`` of the sampler.
        steps_before: steps of this epoch that were taken before the pass began.
        drawn: of these, how many the loader has asked for; with workers it is ahead of the steps.
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
        """An optimizer step is over."""
        self.steps += 1
        if self.steps == 1:
            self._drawn_first = self.drawn

    @property
    def taken(self) -> int:
        """Samples that the loaders have drawn, all ranks together: somewhat ahead of the steps."""
        return min(self.begin + self.drawn * self.replicas, self.size)

    def used(self, epoch: int, batch_size: int) -> int:
        """Samples of the order that are used by now, all ranks together.

        Args:
            epoch, batch_size: what the script says; samples per optimizer step of one rank.

        Raises:
            UsageError: it says what cannot be.
        """
        if epoch != self.epoch:
            raise UsageError(
                f"save_checkpoint was told epoch {epoch}, but the sampler is in epoch "
                f"{self.epoch}: begin the loop at the epoch that load_checkpoint gave"
            )
        if not self.steps:
            if self.drawn < self.length:
                raise UsageError(
                    "call should_save(step) at the end of every optimizer step: without it nobody "
                    "knows how many samples of the epoch were used"
                )
            return self.size
        taken = (self.steps - 1) * batch_size
        if self.drawn < self.length and self.drawn - self._drawn_first != taken:
            real = (self.drawn - self._drawn_first) / (self.steps - 1) if self.steps > 1 else 0
            raise UsageError(
                f"save_checkpoint was told batch_size={batch_size}, but a step takes {real:g} "
                "samples of each rank: give the batch size times the accumulation, and call "
                "should_save once per optimizer step"
            )
        return min(self.begin + self.steps * batch_size * self.replicas, self.size)


@dataclass
class Resumed:
    """Where the checkpoint was made that this process has loaded.

    Attributes:
        samples, steps: of this epoch; samples of all ranks together.
        size, order_seed: of the data; no size if they are not known.
    """

    epoch: int
    samples: int
    steps: int = 0
    size: int = 0
    order_seed: int | None = None

    def per_rank(self, replicas: int) -> int:
        """The seed's unit; where it does not divide, some samples would be used again."""
        return self.samples // replicas

    def check(self, size: int, order_seed: int | None) -> None:
        """See that a sampler has the same data in the same order.

        Raises:
            DataMismatch: it has not.
        """
        if self.size and (self.size, self.order_seed) != (size, order_seed):
            raise DataMismatch(
                f"the checkpoint was made with {self.size} samples in the order of seed "
                f"{self.order_seed}, but the sampler has {size} and seed {order_seed}: use the "
                "same data and seed, or another directory to start anew"
            )


@dataclass
class _Course:
    current: DataPass | None = None
    resumed: Resumed | None = None
    on_begin: Callable[[], None] = lambda: None


_course = _Course()
"""A process trains one model."""


def begin_pass(found: DataPass) -> None:
    """A sampler begins to be read for training.

    Raises:
        UsageError: another one may be in the middle of its own.
    """
    now = _course.current
    if now is not None and now.owner != found.owner:
        is_over = now.drawn == now.length and now.epoch != found.epoch
        if not is_over:
            raise UsageError(
                "two samplers are read for training at a time: read the one for evaluation "
                "under torch.no_grad()"
            )
    _course.current = found
    _course.on_begin()


def current_pass() -> DataPass | None:
    """The one that is under way, or was last."""
    return _course.current


def resume_at(place: Resumed | None, on_begin: Callable[[], None]) -> None:
    """Where the next pass begins, and what is to be done there, once."""

    def once() -> None:
        _course.on_begin = lambda: None
        on_begin()

    _course.current = None
    _course.resumed = place
    _course.on_begin = once


def resumed() -> Resumed | None:
    """Where the job goes on, until a sampler has gone there."""
    return _course.resumed


def take_resumed() -> Resumed | None:
    """Likewise; the sampler that asks goes there."""
    place, _course.resumed = _course.resumed, None
    return place
