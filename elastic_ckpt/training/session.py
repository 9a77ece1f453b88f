"""A training run that resumes, keeps its place in the data, and leaves when it is told to.

Where a save happens. Step ``s`` ends when the script asks for the next batch. A save that follows
from the step number (the interval) is made there. A save or stop that was asked for is made where
step ``s + 1`` would begin, because a rank may learn of it as late as that; whatever the script
does at the end of an epoch lies before that point on every rank, so the position is then the
beginning of the next epoch.

The random state that is saved is that of the same moment. So a batch must not draw random numbers
between the two points: with ``num_workers=0``, where fetching runs in this process, it counts as
part of the step and the step is entered before it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.data import DataLoader

from elastic_ckpt.checkpoint.manifest import Reason, SealHeader
from elastic_ckpt.checkpoint.position import Place
from elastic_ckpt.errors import (
    DataMismatch,
    NonFiniteLoss,
    UnequalSteps,
    UsageError,
)
from elastic_ckpt.policy.accumulation import accumulation_steps
from elastic_ckpt.policy.interval import SaveInterval
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.protocol.agreement import ActionKind
from elastic_ckpt.protocol.slot import Phase, SlotWriter, Source
from elastic_ckpt.training import runtime as runtimes
from elastic_ckpt.training.data.fingerprint import dataset_fingerprint
from elastic_ckpt.training.data.sampler import ElasticSampler
from elastic_ckpt.training.engines import EngineInputs, make_engine
from elastic_ckpt.training.state.candidate import Loaded
from elastic_ckpt.training.state.load import load_newest
from elastic_ckpt.training.state.rank_state import RankState
from elastic_ckpt.training.state.rng import preserved_rng
from elastic_ckpt.training.state.saver import Saver
from elastic_ckpt.training.state.snapshot import REASONS, Snapshot
from elastic_ckpt.training.step_timer import StepTimer


class Session:
    """Resumes on entry, saves and stops while the script iterates, saves once more at the end.

    Every method is collective unless it says otherwise.

    Args:
        save_dir: the job directory; None takes ``ELASTIC_CKPT_DIR``, which a supervisor sets.
        booster: a ColossalAI ``Booster``, or None for plain torch (a bare module or DDP).
        model, optimizer, lr_scheduler: boosted, if there is a booster; the last may be None.
        accumulation_steps: micro-batches per optimizer step.
        global_batch: samples of one optimizer step on all ranks together, instead: accumulation
            follows the world size. 0 for none; ``--global-batch`` of the supervisor goes before it.
        save_interval: optimizer steps between saves, 0 for none; ``--save-interval`` of the
            supervisor goes before it.
        retention: which checkpoints are kept, None for all; ``--keep-last`` and the like of the
            supervisor go before it.
        extra: objects with ``state_dict`` and ``load_state_dict``, by name, saved per rank.
        engine: the name of an engine that another package provides; None selects ColossalAI's with
            a booster and torch's without.
        use_async: have TensorNVMe write what a booster saves, if it is installed.

    Attributes:
        resumed_from: the checkpoint's directory, None for a fresh start.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        *,
        booster: Any = None,
        model: Any,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        accumulation_steps: int = 1,
        global_batch: int = 0,
        save_interval: int = 0,
        retention: Retention | None = None,
        extra: dict[str, Any] | None = None,
        engine: str | None = None,
        use_async: bool = False,
    ) -> None:
        if accumulation_steps < 1 or global_batch < 0 or save_interval < 0:
            raise UsageError(
                "accumulation_steps must be at least 1, global_batch and save_interval at least 0"
            )
        if accumulation_steps > 1 and global_batch:
            raise UsageError("give accumulation_steps or global_batch, which makes it follow")
        if not isinstance(retention, Retention | None):
            raise UsageError(
                f"retention is a Retention, as in Retention(last=2), not {retention!r}"
            )
        self._save_dir = save_dir
        self._state = (booster, model, optimizer, lr_scheduler)
        self._accumulation_steps = accumulation_steps
        self._global_batch = global_batch
        self._save_interval = save_interval
        self._retention = retention
        self._engine = engine
        self._use_async = use_async
        self._metrics: dict[str, float] = {}
        self._slot: SlotWriter | None = None
        self._max_epochs = 0
        self._rank_state = RankState(dict(extra or {}))
        self._place = Place()
        self._samples_per_batch = 0
        self._replicas = 1
        self._manifest: SealHeader | None = None
        self._optimizer_stepped = False
        self._step_ends = False
        self._batch_is_out = False
        self._group_batches = 0
        self._save_is_owed = False
        self._used_epoch = -1
        self._dataset: Any = None
        self.resumed_from: Path | None = None

    # -- entering and leaving ---------------------------------------------------------------

    def __enter__(self) -> Session:
        """Resume from the newest intact checkpoint.

        Raises:
            NoUsableCheckpoint, UnsupportedFormat, CheckpointError: as ``load_newest`` does.
            LockHeld, DirectoryUnusable: without a supervisor, when the directory is taken.
        """
        self._runtime = runtimes.join(self._save_dir)
        slot = self._slot = self._runtime.slot
        slot.phase(Phase.LOADING)
        engine = make_engine(EngineInputs(*self._state, self._use_async), self._engine)
        told = self._runtime.supervised
        self._interval = SaveInterval(
            steps=(told.save_interval_steps if told else 0) or self._save_interval
        )
        self._global_batch = (told.global_batch if told else 0) or self._global_batch
        if self._retention is not None and not self._runtime.retain.rule:
            self._runtime.retain.rule = self._retention
        self._saver = Saver(self._runtime, engine, self._state[2])
        self._timer = StepTimer(slot, self._state[1])
        found = load_newest(self._runtime, engine)
        if found is not None:
            self._resume(found)
        slot.loaded(found.source if found else Source.NOTHING)
        self._runtime.steps.attach(self._place.step)
        self._watch_optimizer()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Save once more if the script came to its end; after an exception nothing is saved."""
        if error is not None:
            return
        self._settle()
        self._saver.complete()
        if self._place.step > 0 and (self._place.epoch, self._place.step) != self._saver.last:
            self._save("final")
        steps = self._runtime.steps
        self._runtime.retain.finish(lambda: steps.asked)
        self._runtime.slot.phase(Phase.LEAVING)

    # -- what a script reads ------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps finished since the job began."""
        return self._place.step

    @property
    def epoch(self) -> int:
        """The epoch that is under way."""
        return self._place.epoch

    @property
    def step_ends(self) -> bool:
        """Whether the optimizer steps with this micro-batch: it is the last of its group."""
        return self._step_ends

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step; with a global batch known inside of ``batches``."""
        return self._accumulation_steps

    def report(self, **metrics: float) -> None:
        """Say how well the model does; the last word stands in every later checkpoint.

        Not collective: what rank 0 says counts, for retention by a metric. Of ``loss`` every
        rank's word counts: one that is infinite or no number is a failure of this step.

        Raises:
            UsageError: a value is no number.
            NonFiniteLoss: ``loss`` is not finite; the supervisor restarts from a checkpoint.
        """
        for name, value in metrics.items():
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's
                raise UsageError(f"report({name}=...) needs a number, not {value!r:.80}") from None
            self._metrics.pop(name, None)
            if name == "loss" and not math.isfinite(number):
                raise NonFiniteLoss(f"the loss of step {self.step + 1} is {number}")
            if math.isfinite(number):  # what is not finite is no best, and no JSON
                self._metrics[name] = number
                if self._slot is not None:
                    self._slot.metric(name, number)

    # -- the loop -----------------------------------------------------------------------------

    def epochs(self, max_epochs: int) -> Iterator[int]:
        """The epochs that are left, the one that was interrupted first.

        A job that was saved at the last step of an epoch comes back to that epoch, with no
        batches left, so that what the script does at its end is done.
        """
        self._rank_state.restore_rng(iterating=False)
        self._max_epochs = max_epochs
        while self._place.epoch < max_epochs:
            yield self._place.epoch
            self._settle()
            self._place.next_epoch()
            if self._save_is_owed and self._place.epoch < max_epochs:
                self._save("interval")  # the script left the epoch at the step that was due

    def batches(self, dataloader: DataLoader[Any]) -> Iterator[Any]:
        """The micro-batches of this epoch that are left, once per epoch.

        Samples count as consumed when the script asks for the batch behind them, whatever was
        prefetched. A group of micro-batches that the epoch's end cuts short makes a shorter last
        step, or is left out if the sampler was given ``drop_last``.

        Args:
            dataloader: built with an ``ElasticSampler``.

        Raises:
            UsageError: it was not, or it has no fixed batch size.
            DataMismatch: the data or their order are not the checkpoint's.
            UnequalSteps: the ranks would run different numbers of steps.
            SystemExit: at the agreed stop step, behind the seal.
        """
        sampler = self._prepare(dataloader)
        count = len(dataloader)
        if sampler.drop_last or dataloader.drop_last:
            count -= count % self._accumulation_steps
        self._check_equal(count)
        self._tell_course(dataloader, sampler, count)
        self._rank_state.restore_rng(iterating=False)
        if count == 0:
            self._rank_state.restore_rng()
            return
        iterator = iter(dataloader)
        self._rank_state.restore_rng()
        in_process = dataloader.num_workers == 0
        slot = self._runtime.slot
        try:
            for index in range(count):
                begins = index % self._accumulation_steps == 0
                if begins and in_process:
                    self._boundary()
                slot.phase(Phase.FETCHING)
                self._timer.fetching()
                batch = next(iterator)
                self._timer.fetched()
                slot.phase(Phase.TRAINING)
                if begins and not in_process:
                    self._boundary()
                self._step_ends = (index + 1) % self._accumulation_steps == 0 or index + 1 == count
                self._group_batches = index % self._accumulation_steps + 1
                yield from self._hand_out(batch)
                if self._step_ends:
                    self._finish_step()
        finally:  # the script may leave by break
            self._timer.interrupted()
            slot.phase(Phase.BETWEEN)

    @contextmanager
    def evaluation(self, *, interruptible: bool = False) -> Iterator[Evaluation]:
        """Declare an evaluation; not collective.

        The random state is put back afterwards, so that an evaluation changes nothing in the
        training. A notice waits for its end.

        Args:
            interruptible: the body runs no collectives and may be left early: what iterates
                through ``Evaluation.batches`` is, and ``interrupted`` says so.
        """
        steps = self._runtime.steps
        evaluation = Evaluation(interruptible, _asked=lambda: steps.asked)
        self._timer.interrupted()
        before = self._runtime.slot.phase(Phase.EVALUATING)
        with preserved_rng():
            try:
                yield evaluation
            except EvaluationLeft:
                evaluation.interrupted = True
            finally:
                self._runtime.slot.phase(before)

    # -- inside: the data ---------------------------------------------------------------------

    def _prepare(self, dataloader: DataLoader[Any]) -> ElasticSampler:
        sampler = dataloader.sampler
        if not isinstance(sampler, ElasticSampler):
            raise UsageError(
                f"session.batches needs a DataLoader with an ElasticSampler, not with a "
                f"{type(sampler).__name__}: DataLoader(dataset, sampler=ElasticSampler(dataset, "
                "seed=0), ...)"
            )
        if dataloader.batch_size is None:
            raise UsageError("session.batches needs a DataLoader with a batch_size")
        if self._used_epoch == self._place.epoch:
            raise UsageError("session.batches may be called once per epoch")
        self._used_epoch = self._place.epoch
        place = self._place
        if self._dataset is not dataloader.dataset:  # looked at once: it reads samples
            self._dataset = dataloader.dataset
            place.fingerprint = dataset_fingerprint(dataloader.dataset)
        place.dataset_size = sampler.dataset_size
        place.order_seed = sampler.order_seed
        self._check_data()
        self._replicas = sampler.num_replicas
        self._samples_per_batch = dataloader.batch_size * sampler.num_replicas
        if self._global_batch:
            self._accumulation_steps = accumulation_steps(
                self._global_batch, dataloader.batch_size, sampler.num_replicas
            )
        sampler.set_position(place.epoch, place.samples)
        return sampler

    def _check_data(self) -> None:
        saved, place = self._manifest, self._place
        self._manifest = None
        if saved is None or not saved.dataset_fingerprint:
            return
        if saved.dataset_size != place.dataset_size:
            what = f"it has {place.dataset_size} samples instead of {saved.dataset_size}"
        elif saved.dataset_fingerprint != place.fingerprint:
            what = "its samples differ"
        elif saved.order_seed != place.order_seed:
            what = f"its order has seed {place.order_seed} instead of {saved.order_seed}"
        else:
            return
        raise DataMismatch(
            f"the data set is not the one of {saved.checkpoint_name}: {what}; use the same data "
            "and seed, or another directory to start anew"
        )

    def _check_equal(self, count: int) -> None:
        """All ranks run the same number of micro-batches; looked at once per epoch."""
        peers = self._runtime.peers
        counts = peers.collect("batches", lambda: str(count).encode())
        told = peers.tell("equal", b" ".join(sorted(set(counts)))).decode()
        if " " in told:
            raise UnequalSteps(
                f"the ranks' loaders have different numbers of batches ({told}): give every rank "
                "the same data set, batch size and ElasticSampler arguments"
            )

    def _tell_course(
        self, dataloader: DataLoader[Any], sampler: ElasticSampler, count: int
    ) -> None:
        """Say where the script is going, for ``status``: it has so many batches left here."""
        accumulation = self._accumulation_steps
        dropped = sampler.drop_last or dataloader.drop_last
        parts = (sampler.num_replicas, dataloader.batch_size or 1, accumulation)
        steps = sampler.dataset_size
        for part, floor in zip(
            parts, (sampler.drop_last, dataloader.drop_last, dropped), strict=True
        ):
            steps = steps // part if floor else -(-steps // part)
        epochs = max(0, self._max_epochs - self._place.epoch - 1)
        total = self._place.step - (-count // accumulation) + epochs * steps
        self._runtime.slot.course(
            total if self._max_epochs else 0, self._samples_per_batch * accumulation
        )

    # -- inside: steps ------------------------------------------------------------------------

    def _hand_out(self, batch: Any) -> Iterator[Any]:
        """Yield a batch; a ``break`` behind an optimizer step still counts that step."""
        epoch = self._place.epoch
        self._optimizer_stepped = False
        self._batch_is_out = True
        self._timer.handed_out()
        try:
            yield batch
        except GeneratorExit:
            if self._place.epoch == epoch:
                self._settle()
            raise
        self._batch_is_out = False
        self._timer.taken_back()

    def _settle(self) -> None:
        """Count the step of a batch that was left by ``break``.

        Python closes this generator when nothing refers to it any more, which may be late: so
        whatever depends on the count settles it first.
        """
        if self._batch_is_out and self._optimizer_stepped and self._step_ends:
            self._count_step()
        self._batch_is_out = False

    def _finish_step(self) -> None:
        self._count_step()
        self._timer.stepped()
        if not self._saver.complete() or self._save_is_owed:
            self._save("interval")

    def _count_step(self) -> None:
        """A step's samples count together: what a group left halfway used is used again."""
        self._runtime.steps.stepped()
        self._place.count_step(self._group_batches * self._samples_per_batch)
        self._save_is_owed = self._interval.due(self._place.step)

    def _boundary(self) -> None:
        """The next step is about to begin: do what all ranks agreed to do before it."""
        place = self._place
        while True:
            action = self._runtime.steps.enter(place.step, place.epoch, place.samples)
            if action.kind is ActionKind.GO:
                return
            self._saver.complete()
            if self._saver.last[-1] != place.step and place.step > 0:
                self._save(REASONS[action.kind])
            if action.kind is ActionKind.STOP:
                self._runtime.leave(saved=self._saver.last[-1] >= 0)

    # -- inside: state ------------------------------------------------------------------------

    def _save(self, reason: Reason) -> None:
        self._save_is_owed = False
        self._timer.interrupted()
        self._saver.save(self._snapshot(reason))

    def _snapshot(self, reason: Reason) -> Snapshot:
        place, peers = self._place, self._runtime.peers
        replicas = self._replicas if self._samples_per_batch else peers.world_size
        iterating = self._used_epoch == place.epoch
        return Snapshot(
            reason=reason,
            position=place.freeze(),
            running_states={
                "epoch": place.epoch,
                "step": place.step_in_epoch,
                "sample_start_index": place.samples // replicas,
            },
            samples_per_step=self._samples_per_batch * self._accumulation_steps,
            data_parallel_size=replicas,
            rank_state=lambda: self._rank_state.capture(iterating=iterating),
            metrics=dict(self._metrics),
        )

    def _resume(self, loaded: Loaded) -> None:
        seal = self._manifest = loaded.seal
        self._place = Place.of(seal)
        self._metrics = {**seal.metrics, **self._metrics}
        self._saver.last = (seal.epoch, seal.step)
        self.resumed_from = self._runtime.job.checkpoint(seal.epoch, seal.step)
        self._rank_state.resume(loaded, self._runtime.peers.rank)

    def _watch_optimizer(self) -> None:
        optimizer = self._state[2]
        inner = getattr(optimizer, "optim", optimizer)
        if hasattr(inner, "register_step_post_hook"):
            inner.register_step_pre_hook(self._before_optimizer_step)
            inner.register_step_post_hook(self._after_optimizer_step)

    def _before_optimizer_step(self, *_: Any) -> None:
        self._timer.optimizing()

    def _after_optimizer_step(self, *_: Any) -> None:
        self._optimizer_stepped = True


@dataclass
class Evaluation:
    """Handed out by ``Session.evaluation``."""

    interruptible: bool
    interrupted: bool = field(default=False)
    _asked: Callable[[], bool] = field(default=lambda: False, repr=False)

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches; leaves the ``with`` block early if that was declared and a
        notice has come."""
        for batch in loader:
            if self.interruptible and self._asked():
                raise EvaluationLeft
            yield batch


class EvaluationLeft(Exception):
    """Leaves the body of an interruptible evaluation."""
