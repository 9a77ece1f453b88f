"""PyTorch Lightning: a callback for the Trainer, and the same for a loop on Fabric.

Lightning's checkpoint holds weights, optimizers, schedules and counters. Three things that decide
the next steps are not in it: the random state, the order of an epoch that has begun, and the place
in it. The callback adds them for every rank. It saves where an iteration of Lightning's loop ends,
after the validation that is due there, because its counters are consistent only then: a checkpoint
of ``on_train_batch_end`` skips that validation, and one of an epoch's last batch that epoch's end.
"""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from elastic_ckpt.checkpoint.own.seal import seals, where_intact
from elastic_ckpt.errors import CheckpointError, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.protocol.agreement import ActionKind
from elastic_ckpt.training import runtime as runtimes
from elastic_ckpt.training.data.loader_order import LoaderOrder
from elastic_ckpt.training.data.sampler import ElasticSampler
from elastic_ckpt.training.own.loop import OwnLoop
from elastic_ckpt.training.own.values import decode, encode, plain, unplain
from elastic_ckpt.training.state.rng import capture_rng, diverge_rng, restore_rng

OLDEST: Final = (2, 6)
"""The first version of Lightning whose loops this file was written for."""

_KEY: Final = "elastic_ckpt"
_FILE: Final = "lightning.ckpt"
_MARKER: Final = "complete"
_PACKAGES: Final = ("lightning.pytorch", "pytorch_lightning")


def _package() -> Any:
    """Return the package that the script has imported, else the one that is installed."""
    for name in (*(one for one in _PACKAGES if one in sys.modules), *_PACKAGES):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise UsageError("Lightning is not installed: pip install 'lightning>=2.6'")


_lightning: Any = _package()


class ElasticCallback(_lightning.Callback):
    """Saves on a notice, on request and on an interval, and leaves at a stop; resumes exactly.

    Args:
        every_n_steps: optimizer steps between saves; 0 saves only when asked.
        directory: where the checkpoints go; by default ``lightning`` in the job directory.
    """

    def __init__(
        self, every_n_steps: int = 0, directory: str | os.PathLike[str] | None = None
    ) -> None:
        version = str(_lightning.__version__)
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            raise UsageError(
                f"Lightning {version} is too old for ElasticCallback: pip install 'lightning>=2.6'"
            )
        if every_n_steps < 0:
            raise UsageError(f"every_n_steps must be 0 or more, not {every_n_steps}")
        self._every = every_n_steps
        self._given = directory
        self._directory = Path()
        self._loop: OwnLoop | None = None
        self._step = 0
        self._due: ActionKind | None = None  # at the end of the epoch
        self._handler: Any = None
        self._loaded: dict[str, Any] | None = None  # what a checkpoint says, until it is used
        self._resumed: dict[str, Any] | None = None  # of this rank, until the first batch
        self._orders: list[LoaderOrder | None] = []
        self._ahead: list[Any] = []  # batches that were read, but not trained on
        self._skip = 0  # batches to read and drop, of a stream without a state
        self._extra = -1, 0  # in this epoch, samples that are done beyond the batches' own

    @staticmethod
    def newest() -> str | None:
        """Return the newest intact checkpoint, for ``trainer.fit(ckpt_path=...)``; None if none.

        Each rank looks by itself, because Lightning makes the process group later. A supervisor has
        read it to its last byte before the launch; without one it is read here.

        Raises:
            UsageError: no job directory is known.
        """
        directory = os.environ.get("ELASTIC_CKPT_DIR")
        if directory is None:
            raise UsageError(
                "no job directory: start with elastic-ckpt run, or set ELASTIC_CKPT_DIR"
            )
        job = JobDirectory.at(directory)
        for one in seals(job):
            try:
                where_intact(job, one)
            except (CheckpointError, OSError):
                continue
            if (path := Path(one.path) / _FILE).exists():
                return str(path)
        return None

    # -- Lightning's hooks --------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the job, and take part in the training loop."""
        if stage != "fit":
            return
        _check(trainer)
        if self._loop is None:
            self._loop = OwnLoop()
            self._directory = _directory(self._given)
            self._loop.watch(f"{self._directory}/step-*", _MARKER)
        self._handler = signal.getsignal(signal.SIGTERM)
        fit, batches = trainer.fit_loop, trainer.fit_loop.epoch_loop
        _after(batches, "on_run_start", lambda: self._first_batch(trainer))
        _after(batches, "on_advance_end", lambda: self._batch_done(trainer))
        _after(fit, "on_advance_end", lambda: self._epoch_done(trainer))
        loads = type(fit)._load_combined_loader_states
        fit._load_combined_loader_states = lambda: self._place(trainer, lambda: loads(fit))

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out, of every rank, to any checkpoint. Collective."""
        if self._loop is None or trainer.fit_loop._combined_loader is None:
            return
        ranks = runtimes.joined().peers.collect("random", lambda: encode(self._capture(trainer)))
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        epoch, extra = self._extra
        extra = extra if epoch == trainer.fit_loop.epoch_progress.current.processed else 0
        checkpoint[_KEY] = {
            "batches": batches,
            "samples": batches * _global_batch_size(trainer) + extra,
            "order": self._order_name(),
            "ranks": [decode(one) for one in ranks],
        }

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep what was added, until the loaders exist."""
        self._loaded = checkpoint.get(_KEY, {})
        self._step = checkpoint["global_step"]
        trainer.num_sanity_val_steps = 0  # it changes the counters that were loaded

    # -- saving -------------------------------------------------------------------------------

    def _batch_done(self, trainer: Any) -> None:
        """Act once per optimizer step: Lightning calls this per batch that it accumulates."""
        step = trainer.global_step
        if step == self._step or self._loop is None:
            return
        due = self._every and step // self._every != self._step // self._every
        self._step = step
        action = self._loop.after_step(step)
        if action is ActionKind.GO and not due:
            return
        if trainer.fit_loop.epoch_loop._is_training_done:
            self._due = action
        else:
            self._save(trainer, self._loop, action)

    def _epoch_done(self, trainer: Any) -> None:
        """Save what was due after the last batch: the end of an epoch has metrics of all of it."""
        action, self._due = self._due, None
        if action is not None and self._loop is not None:
            self._save(trainer, self._loop, action)

    def _save(self, trainer: Any, loop: OwnLoop, action: ActionKind) -> None:
        path, peers = self._directory / f"step-{self._step:08d}", runtimes.joined().peers

        def prepare() -> None:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)

        peers.leader_does("prepare", prepare)
        trainer.save_checkpoint(path / _FILE)
        peers.leader_does("complete", (path / _MARKER).touch)
        loop.saved(self._step)
        if action is ActionKind.STOP and not trainer.fit_loop.done:
            loop.leave()

    def _capture(self, trainer: Any) -> dict[str, Any]:
        loop = trainer.fit_loop
        loaders: list[dict[str, Any]] = []
        for loader, order in zip(loop._combined_loader.flattened, self._orders, strict=True):
            if order is not None:
                loaders.append({"begun": order.begun, "now": order.generators()})
            else:
                loaders.append({"state": loader.state_dict()} if _has_state(loader) else {})
        has_state = any("state" in one for one in loaders)
        ahead = list(getattr(loop._data_fetcher, "batches", ())) if has_state else []
        return {"random": plain(capture_rng()), "loaders": plain(loaders), "ahead": ahead}

    # -- resuming -----------------------------------------------------------------------------

    def _place(self, trainer: Any, loads: Callable[[], None]) -> None:
        """Put the loaders where the checkpoint was made. Lightning makes their iterators next."""
        loop, loaded, self._loaded = trainer.fit_loop, self._loaded, None
        loaders = loop._combined_loader.flattened
        self._orders, self._extra = [LoaderOrder.of(loader) for loader in loaders], (-1, 0)
        for loader in loaders:
            _check_sampler(trainer, loader)
        if loaded is None:
            return
        progress = loop.epoch_progress.current
        if progress.processed == progress.ready:  # with max_steps, Lightning would skip an epoch
            loop._restarting = loop.epoch_loop.restarting = False
        for loader in loaders:  # Lightning itself does so after the workers have begun to read
            _set_epoch(loader, progress.processed)
        batches = loop.epoch_loop.batch_progress.current.processed if loop.restarting else 0
        if not loaded:
            loads()
            runtimes.joined().leader_says(
                "the checkpoint was made without ElasticCallback: random numbers, and an order "
                "that no seed and epoch decide, differ from an undisturbed run's"
            )
        elif batches:
            batches = self._batches_done(trainer, loaded, batches)
        mine = _of_this_rank(trainer, loaded)
        states = mine.get("loaders") or [{}] * len(loaders)
        for loader, order, state in zip(loaders, self._orders, states, strict=True):
            if order is None and "state" in state:
                loader.load_state_dict(state["state"])
                if not loop.restarting:
                    iter(loader)  # this one ends the epoch that is over; Lightning's is the next
            elif order is None:
                self._skip = batches
            elif batches and not self._is_elastic():
                order.resume(state.get("begun"), batches % len(loader) or batches)
        self._ahead = mine.get("ahead", [])
        self._resumed = mine
        if mine and not loop.restarting:
            self._restore_random(trainer)  # before the iterators draw from it, as undisturbed

    def _batches_done(self, trainer: Any, loaded: dict[str, Any], batches: int) -> int:
        """Return the batches of the epoch that are done, counted in this run's batches."""
        loop, size, before = trainer.fit_loop, _global_batch_size(trainer), len(loaded["ranks"])
        epoch, samples = loop.epoch_progress.current.processed, loaded["samples"]
        order, more, [loader, *_] = self._orders[0], 0, loop._combined_loader.flattened
        if order is not None and self._is_elastic():
            batches = len(loader) - order.resume_after(epoch, samples)
            self._extra = epoch, samples - batches * size
        elif before != trainer.world_size:
            batches, more = divmod(samples, size)
        if before != trainer.world_size:
            now = self._order_name()
            is_same = loaded.get("order", now) == now != ""
            if warning := _inexact(before, more, size, is_same=is_same):
                runtimes.joined().leader_says(warning)
        progress = loop.epoch_loop.batch_progress.current
        shift = batches - progress.processed
        for one in ("ready", "started", "processed", "completed"):
            setattr(progress, one, getattr(progress, one) + shift)
        return int(batches)

    def _order_name(self) -> str:
        """Return the name of the one loader's order; empty if several are read, or it has none."""
        return self._orders[0].name if len(self._orders) == 1 and self._orders[0] else ""

    def _is_elastic(self) -> bool:
        return self._order_name() == "elastic"

    def _first_batch(self, trainer: Any) -> None:
        """Restore what the start of the loop has used up, right before the first batch."""
        if threading.current_thread() is threading.main_thread():
            # Lightning's handler would end the loop without a save
            signal.signal(signal.SIGTERM, self._handler)
        if self._loop is not None:
            self._loop.begin(trainer.global_step)
        if self._resumed is None:
            return
        fetcher = trainer.fit_loop._data_fetcher
        for _ in range(self._skip):
            next(fetcher, None)
        if self._skip:
            self._skip, fetcher.fetched = 0, self._skip
        if self._ahead:
            rest = fetcher.iterator  # not to be passed to iter(), which begins it anew
            fetcher.iterator = itertools.chain(fetcher.batches, iter(lambda: next(rest), None))
            fetcher.batches = self._ahead
        if fetcher.length is not None:
            fetcher.done = fetcher.fetched >= fetcher.length
        self._restore_random(trainer)

    def _restore_random(self, trainer: Any) -> None:
        mine, self._resumed = self._resumed, None
        if mine:
            restore_rng(mine["random"])
            for order, state in zip(self._orders, mine["loaders"], strict=True):
                if order is not None:
                    order.set_generators(state["now"])
            if mine["is_copy"]:
                diverge_rng(trainer.global_rank)


def _check(trainer: Any) -> None:
    """Raise UsageError for a Trainer that the callback cannot save for."""
    if sum(isinstance(one, ElasticCallback) for one in trainer.callbacks) > 1:
        raise UsageError("Trainer(callbacks=...) has two ElasticCallback: pass one")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks != trainer.world_size:
        raise UsageError(
            f"the Trainer uses {trainer.world_size} of {ranks} processes: pass "
            f"Trainer(devices={os.environ.get('LOCAL_WORLD_SIZE', ranks)}, strategy='ddp'), with "
            "num_nodes= on several nodes"
        )


def _check_sampler(trainer: Any, loader: Any) -> None:
    """Raise UsageError if an ElasticSampler does not give each rank its own share."""
    sampler = getattr(loader, "sampler", None)
    inside = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    if isinstance(inside, ElasticSampler):
        raise UsageError(
            "Lightning divides what ElasticSampler has already divided among the ranks: pass "
            "Trainer(use_distributed_sampler=False)"
        )
    if isinstance(sampler, ElasticSampler) and sampler.num_replicas != trainer.world_size:
        raise UsageError(
            f"the ElasticSampler was made for {sampler.num_replicas} of {trainer.world_size} "
            "ranks: make it in train_dataloader(), where the ranks are known"
        )


def _directory(given: str | os.PathLike[str] | None) -> Path:
    if given is None:
        return runtimes.joined().job.root / "lightning"
    return Path(given).resolve()


def _after(owner: Any, name: str, call: Callable[[], None]) -> None:
    """Have a method of this one object followed by a call."""
    method = getattr(type(owner), name)

    def both(*arguments: Any) -> None:
        method(owner, *arguments)
        call()

    setattr(owner, name, both)


def _of_this_rank(trainer: Any, loaded: dict[str, Any]) -> dict[str, Any]:
    """Return what was saved for this rank, or, if there were fewer, for another one."""
    ranks, rank = loaded.get("ranks"), trainer.global_rank
    if not ranks:
        return {}
    mine = unplain(ranks[rank % len(ranks)])
    return {**mine, "is_copy": rank >= len(ranks)}


def _inexact(before: int, more: int, size: int, *, is_same: bool) -> str:
    """Return what is wrong with an epoch that other processes have begun; empty if nothing is."""
    if not is_same:
        return (
            f"the rest of this epoch repeats some samples and skips others: {before} processes "
            "began it in an order that depends on their number; with ElasticSampler each sample is "
            "used once (docs/lightning.md)"
        )
    return f"{more} samples of this epoch are read twice: they fill no batch of {size}" * (more > 0)


def _global_batch_size(trainer: Any) -> int:
    """Return the samples of a batch of all ranks; of 1 each if the loader does not say."""
    loader = trainer.fit_loop._combined_loader.flattened[0]
    sampler = getattr(loader, "batch_sampler", None)
    size = getattr(sampler, "batch_size", None) or getattr(loader, "batch_size", None) or 1
    return int(size) * int(trainer.world_size)


def _set_epoch(loader: Any, epoch: int) -> None:
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    for sampler in (getattr(loader, "sampler", None), inner):
        set_epoch = getattr(sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def _has_state(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
