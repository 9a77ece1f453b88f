"""The order of a loader that another library iterates: read again, from where it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from elastic_ckpt.training.data.sampler import ElasticSampler
from elastic_ckpt.training.state.rng import capture_rng, preserved_rng, restore_rng


class LoaderOrder:
    """Stands in for a loader's batch sampler, and draws the same order again on :meth:`resume`.

    Samplers of torch draw an epoch's order from the random state at their first sample. That state
    is kept; with it, and the number of batches, any sampler is put back without a state of its own.

    Attributes:
        begun: the random state from which the current order was drawn; None before the first.
    """

    def __init__(self, loader: Any, inner: Any) -> None:
        self._inner = inner
        samplers = (loader, getattr(loader, "sampler", None), getattr(inner, "sampler", None))
        found = [getattr(one, "generator", None) for one in samplers]
        self._generators = [one for at, one in enumerate(found) if one is not None
                            and all(one is not other for other in found[:at])]  # fmt: skip
        self.begun: dict[str, Any] | None = None
        self._resume: tuple[dict[str, Any] | None, int] | None = None
        self._after: tuple[int, int] | None = None

    @classmethod
    def of(cls, loader: Any) -> LoaderOrder | None:
        """Take the place of a loader's batch sampler; None for a stream, or a loader with a state.

        Call it before the loader is iterated.
        """
        is_stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
        if not isinstance(loader, DataLoader) or is_stream or hasattr(loader, "state_dict"):
            return None
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        inner = getattr(loader, name)
        order = cls(loader, inner._inner if isinstance(inner, LoaderOrder) else inner)
        object.__setattr__(loader, name, order)  # DataLoader itself refuses a new sampler
        return order

    def resume(self, begun: dict[str, Any] | None, batches: int) -> None:
        """Have the next iteration begin after ``batches`` of the order drawn from ``begun``."""
        self._resume = begun, batches

    @property
    def name(self) -> str:
        """The name of an order that is the same at any number of ranks, which stride through it;
        empty if this one is not known to be."""
        sampler = self._sampler
        if isinstance(sampler, ElasticSampler):
            return "elastic"
        if isinstance(sampler, DistributedSampler) and not hasattr(sampler.dataset, "_sampler"):
            return "shuffled" if sampler.shuffle else "sequential"  # Lightning's wraps another one
        return "sequential" if isinstance(sampler, SequentialSampler) else ""

    def resume_after(self, epoch: int, samples: int) -> int:
        """Have the next iteration begin after ``samples`` of an ElasticSampler's epoch.

        Returns:
            The batches that are left.
        """
        self._after = epoch, samples
        self._sampler.set_position(epoch, samples)
        left = len(self)
        self._sampler.set_epoch(epoch)
        return left

    def state(self) -> dict[str, Any]:
        """Return the random state, with those of the generators that the loader was given."""
        return capture_rng() | {"generators": self.generators()}

    def generators(self) -> list[Any]:
        """Return the states of the generators only."""
        return [one.get_state() for one in self._generators]

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        restore_rng(state)
        self.set_generators(state["generators"])

    def set_generators(self, states: list[Any]) -> None:
        """Restore the generators only."""
        for generator, state in zip(self._generators, states, strict=False):
            generator.set_state(state)

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        if self._after is not None:
            yield from self._rest(*self._after)
            return
        resume, self._resume = self._resume, None
        begun, batches = resume or (None, 0)
        with preserved_rng() if resume else nullcontext():
            now = self.state()
            if begun is not None:
                self.restore(begun)
            self.begun = self.state()
            order = iter(self._inner)
            for _ in range(batches):
                next(order, None)
            if begun is not None:
                self.set_generators(now["generators"])
        yield from order

    @property
    def _sampler(self) -> Any:
        return getattr(self._inner, "sampler", self._inner)

    def _rest(self, epoch: int, samples: int) -> Iterator[Any]:
        """Yield what follows these samples. The library has set the sampler to the epoch's start,
        and counts its length from there."""
        self._after, self.begun = None, self.state()
        self._sampler.set_position(epoch, samples)
        order = iter(self._inner)
        first = list(islice(order, 1))  # the place is read here
        self._sampler.set_epoch(epoch)
        yield from first
        yield from order
