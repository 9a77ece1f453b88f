"""What ``session.batches`` receives: how a loader's place is found again, and its length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
)

from elastic_ckpt.errors import UsageError
from elastic_ckpt.training.data.sampler import ElasticSampler
from elastic_ckpt.training.data.stream import How, Stream
from elastic_ckpt.util.text import printable

LOADER: Final = "DataLoader(dataset, batch_size=..., sampler=ElasticSampler(dataset, seed=0))"

_UNLESS_STATE: Final = (
    'session.batches(loader, position="skip") if it yields the same batches at each start, '
    'position="approximate" to begin it anew after a restart'
)
_CHOICES: Final = f"use torchdata's StatefulDataLoader; or {_UNLESS_STATE}"


@dataclass
class Pass:
    """One loader of a pass.

    Attributes:
        how: how its place is found again.
        batch_size: samples of a batch of this rank; 0 if it has no fixed one.
        replicas: ranks that see different samples.
        drop_last: whether an incomplete batch or group of batches is left out.
        sampler: None unless ``how`` is ``order``.
        count: micro-batches that are left; None if that is unknown.
        stream: None if ``how`` is ``order``.
    """

    loader: Any
    how: How
    batch_size: int
    replicas: int
    drop_last: bool = False
    sampler: ElasticSampler | None = None
    count: int | None = None
    stream: Stream | None = None

    @property
    def in_process(self) -> bool:
        """Whether a step begins before its batch is fetched: that draws random numbers, or the
        loader's state is asked for."""
        return self.stream is not None or self.loader.num_workers == 0


class Batches(Iterator[Any]):
    """The batches of a pass, with their number for a progress bar."""

    def __init__(self, batches: Iterator[Any], length: Callable[[], int | None]) -> None:
        self._batches = batches
        self._length = length
        self._total: int | None = None

    def __iter__(self) -> Iterator[Any]:
        return self._batches

    def __next__(self) -> Any:
        return next(self._batches)

    def __len__(self) -> int:
        """Return how many were left when first asked; TypeError if the loader does not tell."""
        if self._total is None:
            self._total = self._length()
        if self._total is None:
            raise TypeError("the loader of session.batches has no len()")
        return self._total


def inspect(loader: Any, position: str | None, world_size: int) -> Pass:
    """Return how a loader is read.

    Raises:
        UsageError: nothing tells where it is, and the script does not say what to do then.
    """
    if position not in (None, "skip", "approximate"):
        raise UsageError(
            f'position must be "skip" or "approximate", or left out, and not {position!r:.80}'
        )
    sampler, batch_size, drop_last = _order(loader)
    if sampler is not None:
        if batch_size is None:
            raise UsageError("session.batches needs a DataLoader with a batch_size")
        return Pass(loader, "order", batch_size, sampler.num_replicas, drop_last, sampler)
    how: How = "state"
    if position is not None:
        how = "skip" if position == "skip" else "approximate"
        if not hasattr(loader, "__iter__") or hasattr(loader, "__next__"):
            raise UsageError(
                f"session.batches needs a loader that can be iterated anew in each epoch, not a "
                f"{type(loader).__name__}: {LOADER}"
            )
    elif not has_state(loader):
        raise UsageError(_without_place(loader))
    elif forgotten := _forgotten_order(loader):
        raise UsageError(
            f"a {type(loader).__name__} does not save the order of a {forgotten}, which has no "
            "state_dict: after a restart it would repeat samples and leave others out; "
            f"pass {_UNLESS_STATE}"
        )
    own = getattr(loader, "sampler", None)
    replicas = getattr(own, "num_replicas", world_size)
    size = getattr(loader, "batch_size", None)
    return Pass(loader, how, size if isinstance(size, int) else 0, replicas)


def check_position(loaders: Sequence[Any], position: str | None) -> None:
    """Raise UsageError if no loader needs a position that the script gives."""
    if position is not None and all(_order(one)[0] is not None for one in loaders):
        raise UsageError(
            f"position={position!r:.80} is for a loader without an ElasticSampler, whose place is "
            "exact: leave it out; or, if random numbers that loader workers draw must be the same "
            'after a restart, use a DistributedSampler with set_epoch, and position="skip"'
        )


def length_left(now: Pass) -> int | None:
    """Return how many batches a loader has from its sampler's position on, or from its start; None
    if it does not tell."""
    try:
        return len(now.loader)
    except (TypeError, NotImplementedError):
        return None


def cannot_continue(loader: Any, error: Exception) -> str:
    """Return why a loader cannot continue where the checkpoint was made, and what to do."""
    first = printable("".join(str(error).splitlines()[:1]), 200) or type(error).__name__
    return (
        f"the {type(loader).__name__} cannot continue where the checkpoint was made: {first}; "
        'build it as the run that saved did, pass position="approximate", or start over with a '
        "new --dir"
    )


def has_state(thing: Any) -> bool:
    """Return whether an object saves and restores its state."""
    if not getattr(thing, "use_stateful_dataloader", True):  # Accelerate's has methods that fail
        return False
    return all(callable(getattr(thing, one, None)) for one in ("state_dict", "load_state_dict"))


def _order(loader: Any) -> tuple[ElasticSampler | None, int | None, bool]:
    if not isinstance(loader, DataLoader):
        return None, None, False
    for one in (loader, loader.batch_sampler):
        sampler: Any = getattr(one, "sampler", None)
        if isinstance(sampler, ElasticSampler):
            return sampler, getattr(one, "batch_size", None), bool(getattr(one, "drop_last", False))
    return None, None, False


def _forgotten_order(loader: Any) -> str:
    """Return the name of the sampler whose order a loader does not save with its own state; empty
    if it does, or if the order follows from the epoch."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return ""
    order: Any = loader.batch_sampler
    if isinstance(order, BatchSampler):
        order = order.sampler
    is_known = isinstance(order, SequentialSampler | DistributedSampler) or has_state(order)
    if order is None or is_known or type(order).__module__.startswith("torchdata."):
        return ""
    return type(order).__name__


def _without_place(loader: Any) -> str:
    name = type(loader).__name__
    if hasattr(loader, "use_stateful_dataloader"):
        return (
            f"a {name} of Accelerate's has no position to resume at: import Session from "
            "elastic_ckpt.integrations.accelerate (docs/accelerate.md)"
        )
    if not isinstance(loader, DataLoader):
        return (
            f"session.batches needs a DataLoader, not a {name}, which has no position to resume "
            f"at: {LOADER}; or {_CHOICES}"
        )
    if isinstance(loader.dataset, IterableDataset):
        return (
            f"{type(loader.dataset).__name__} is an IterableDataset, which has no position to "
            f"resume at: {_CHOICES}"
        )
    return (
        f"session.batches needs a DataLoader with an ElasticSampler, not with a "
        f"{type(loader.sampler).__name__}: DataLoader(dataset, sampler=ElasticSampler(dataset, "
        f"seed=0), ...); or {_CHOICES}"
    )
