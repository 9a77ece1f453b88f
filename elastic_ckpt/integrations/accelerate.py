"""Hugging Face's Accelerate: a Session for what ``accelerator.prepare`` returned.

``docs/accelerate.md``. The loop is the script's own, so the Session's guarantees are those of any
loop. Two things of Accelerate's would break them. Its loaders read one batch ahead, shuffled by a
generator of their own; so the data are read in the order of an ``ElasticSampler``. And
``accelerator.accumulate`` steps at the last batch of an epoch, which such a loader tells it; so
:class:`Session` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from typing import Any, Final

import accelerate
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    DataLoaderStateMixin,
)
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import GradientState
from accelerate.utils import send_to_device
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

import elastic_ckpt.training.session as sessions
from elastic_ckpt.errors import UsageError
from elastic_ckpt.training.data.loaders import Batches
from elastic_ckpt.training.data.sampler import ElasticSampler
from elastic_ckpt.training.session_inputs import check_extra

MINIMUM: Final = (1, 0)
"""The oldest that is accepted; 1.15 is what was tried."""

if tuple(int(part) for part in accelerate.__version__.split(".")[:2]) < MINIMUM:
    raise UsageError(
        f"accelerate {accelerate.__version__} is too old for elastic_ckpt.integrations.accelerate: "
        "pip install 'accelerate>=1.0'"
    )

_SHARDED: Final = frozenset({"DEEPSPEED", "FSDP", "MEGATRON_LM", "TP", "XLA"})
_KEPT: Final = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn",
    "multiprocessing_context", "prefetch_factor", "persistent_workers",
)  # fmt: skip
"""What a DataLoader that is made anew has of the one that was prepared."""


class Session(sessions.Session):
    """As ``elastic_ckpt.Session``, for a loop with an ``Accelerator``.

    The accumulation is the accelerator's. Its GradScaler, and what was given to
    ``register_for_checkpointing`` before, are saved and restored besides ``extra``.

    Args:
        accelerator: whose ``prepare`` returned the others; data parallel, in any precision.
        model, optimizer, lr_scheduler: as prepared; the last two may be None.
        arguments: further ones of ``elastic_ckpt.Session``.

    Raises:
        UsageError: the accelerator shards the model.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        *,
        accelerator: Any,
        model: Any,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        extra: dict[str, Any] | None = None,
        global_batch: int = 0,
        **arguments: Any,
    ) -> None:
        kind = accelerator.distributed_type.value
        if kind in _SHARDED:
            raise UsageError(
                f"a Session cannot save what Accelerate shards with {kind}: save with "
                "accelerator.save_state, and run with --watch (docs/own-checkpoints.md)"
            )
        added = {
            f"accelerate.registered{number}": one
            for number, one in enumerate(accelerator._custom_objects)
        }
        if accelerator.scaler is not None:
            added["accelerate.scaler"] = accelerator.scaler
        accumulation = 1 if global_batch else accelerator.gradient_accumulation_steps
        super().__init__(
            save_dir,
            model=model,
            optimizer=_inner(optimizer, AcceleratedOptimizer, "optimizer"),
            lr_scheduler=_inner(lr_scheduler, AcceleratedScheduler, "scheduler"),
            accumulation_steps=accumulation,
            global_batch=global_batch,
            extra=check_extra(added) | check_extra(extra if extra is not None else {}),
            **arguments,
        )
        self._accelerator = accelerator
        self._remade: dict[int, tuple[Any, DataLoader[Any]]] = {}  # persistent workers live on

    def batches(self, *loaders: Any, position: str | None = None) -> Batches:
        """As ``elastic_ckpt.Session.batches``, on the accelerator's device.

        A prepared loader of a map-style data set, shuffled or in order, is read in the order of
        ``ElasticSampler(dataset)``, with its own batch size, workers and collation. Another one
        needs a ``position``. One that is not prepared is read as it is.

        Raises:
            UsageError: nothing tells the place in a prepared loader.
        """
        read = tuple(self._readable(loader, position) for loader in loaders)
        batches = super().batches(*read, position=position)
        tells = bool(loaders) and read[0] is loaders[0] and _is_prepared(read[0])
        return Batches(self._hand_out(batches, tells), lambda: _length(batches))

    def _hand_out(self, batches: Batches, tells: bool) -> Iterator[Any]:
        """Yield batches on the device. Unless the loader ``tells`` Accelerate, tell it which is the
        last one of the epoch."""
        accelerator, epoch, left = self._accelerator, _Epoch(), _length(batches) or 0
        accelerator.step = 0  # a pass begins with a step
        if not tells:
            epoch.begin()
        try:
            with closing(iter(batches)) as reading:  # type: ignore[type-var]
                for batch in reading:
                    accelerator.gradient_accumulation_steps = self.accumulation_steps
                    left -= 1
                    epoch.end_of_dataloader = left == 0
                    yield self._placed(batch)
        finally:
            epoch.end()

    def _placed(self, batch: Any) -> Any:
        accelerator = self._accelerator
        return send_to_device(batch, accelerator.device) if accelerator.device_placement else batch

    def _readable(self, loader: Any, position: str | None) -> Any:
        """Return what to read instead of a prepared loader, whose own order is in no checkpoint.

        Raises:
            UsageError: nothing can continue its order, and the script does not say what to do.
        """
        if not _is_prepared(loader):
            return loader
        batches = loader.batch_sampler
        batches = batches.batch_sampler if isinstance(batches, BatchSamplerShard) else batches
        order = getattr(batches, "sampler", None)
        if isinstance(order, ElasticSampler):
            raise UsageError(
                "accelerator.prepare divides the data among the ranks, and so does ElasticSampler: "
                "leave a loader that has one out of accelerator.prepare, and pass it to "
                "session.batches as it is"
            )
        known = type(batches) is BatchSampler and _uses_each_sample_once(order)
        if known and not isinstance(loader, DataLoaderDispatcher):
            if id(loader) not in self._remade:
                self._remade[id(loader)] = loader, self._in_elastic_order(loader, order)
            return self._remade[id(loader)][1]
        if position is None:
            raise UsageError(
                f"nothing tells the place in a loader with a {type(order or batches).__name__}, "
                "also not use_stateful_dataloader: leave a loader with a state of its own out of "
                "accelerator.prepare; or pass session.batches(loader, "
                'position="skip") if it yields the same batches in each epoch of each start, '
                'position="approximate" to begin it anew after a restart'
            )
        loader.iteration = self.epoch  # what it tells its sampler and data set
        return loader

    def _in_elastic_order(self, loader: Any, order: Any) -> DataLoader[Any]:
        accelerator, drop_last = self._accelerator, bool(loader.batch_sampler.drop_last)
        return DataLoader(
            loader.dataset,
            batch_size=loader.total_batch_size // accelerator.num_processes,
            sampler=ElasticSampler(
                loader.dataset,
                num_replicas=accelerator.num_processes,
                rank=accelerator.process_index,
                shuffle=isinstance(order, RandomSampler),
                drop_last=drop_last,
            ),
            drop_last=drop_last,
            **{name: getattr(loader, name) for name in _KEPT},
        )


class _Epoch(DataLoaderStateMixin):
    """What ``accelerator.accumulate`` asks the loader that is being read."""

    def __init__(self) -> None:
        self.gradient_state = GradientState()
        self._drop_last = True  # it has no remainder, which only a gather would use


def _uses_each_sample_once(order: Any) -> bool:
    if isinstance(order, RandomSampler):
        return not order.replacement and order.num_samples == len(order.data_source)
    return isinstance(order, SequentialSampler)


def _is_prepared(loader: Any) -> bool:
    return isinstance(loader, DataLoaderStateMixin)


def _inner(thing: Any, kind: type, name: str) -> Any:
    """Return what Accelerate has wrapped; the thing itself if it is not wrapped."""
    return getattr(thing, name) if isinstance(thing, kind) else thing


def _length(batches: Batches) -> int | None:
    try:
        return len(batches)
    except TypeError:
        return None
