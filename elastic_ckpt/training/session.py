"""A training run that resumes where it was, and saves and stops on request."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.paths import is_session_name
from elastic_ckpt.jobdir.retention_file import note_rule
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.protocol.slot import Phase, SessionStage, Source
from elastic_ckpt.protocol.stepless import STEPLESS
from elastic_ckpt.training import runtime as runtimes
from elastic_ckpt.training.auto_interval import choose_interval
from elastic_ckpt.training.data.consumption import Consumption, inner_optimizer
from elastic_ckpt.training.data.data_loop import DataLoop
from elastic_ckpt.training.data.loaders import Batches
from elastic_ckpt.training.departure import is_exit, leave_together
from elastic_ckpt.training.digests import DigestChain
from elastic_ckpt.training.engines import EngineInputs, make_engine
from elastic_ckpt.training.evaluation import Evaluation, evaluating
from elastic_ckpt.training.reported_metrics import ReportedMetrics
from elastic_ckpt.training.save_points import LoopState, SavePoints
from elastic_ckpt.training.script.other_optimizers import OtherOptimizers
from elastic_ckpt.training.script.settings import ScriptSettings
from elastic_ckpt.training.session_inputs import check_extra, check_inputs
from elastic_ckpt.training.state.candidate import Readable
from elastic_ckpt.training.state.load import load_newest
from elastic_ckpt.training.state.rank_state import RankState
from elastic_ckpt.training.state.saver import Saver
from elastic_ckpt.training.state.session_state import SessionState, read_session_state
from elastic_ckpt.training.step_timer import StepTimer


class Session:
    """Resumes on entry, saves and stops while the script iterates, and saves once more at the end.

    Every method is collective unless it says otherwise.

    Args:
        save_dir: the job directory; None takes ``ELASTIC_CKPT_DIR``, which a supervisor sets.
        name: of the session, for a script with several one after the other, as for folds or for
            pretraining and then a head. A named session has its own checkpoints, place and
            retention, in ``sessions/<name>``; the directory itself holds the unnamed one's.
            Letters, digits, ``-``, ``_`` and ``.``, at most 64.
        booster: a ColossalAI ``Booster``, or None for plain torch (a bare module or DDP).
        model, optimizer, lr_scheduler: boosted if there is a booster; the last may be None.
        accumulation_steps: micro-batches per optimizer step.
        global_batch: samples of one optimizer step on all ranks together; the accumulation then
            follows the world size. 0 for none. The supervisor's ``--global-batch`` overrides it.
        save_interval: optimizer steps between saves, 0 for none. None saves automatically: first
            after a minute, then as often as pays. The supervisor's ``--save-interval`` overrides
            it.
        retention: which checkpoints to keep. None keeps all, but of those that were saved
            automatically only the last two. The supervisor's ``--keep-last`` and the like override
            it.
        extra: objects with ``state_dict`` and ``load_state_dict``, and random generators of
            torch, NumPy or Python, by name, saved per rank where ranks differ; plain values belong
            into ``state``.
        engine: the name of an engine that another package provides; None selects ColossalAI's with
            a booster and torch's without.
        use_async: have TensorNVMe write what a booster saves, if it is installed.

    Attributes:
        resumed_from: the checkpoint's directory, None for a fresh start.
        state: a dict of plain values (numbers, strings, bools, None, lists, dicts), such as the
            best metric or the id of a run elsewhere. Rank 0's are saved with each checkpoint, and
            all ranks have them after entry.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        *,
        name: str = "",
        booster: Any = None,
        model: Any,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        accumulation_steps: int = 1,
        global_batch: int = 0,
        save_interval: int | None = None,
        retention: Retention | None = None,
        extra: dict[str, Any] | None = None,
        engine: str | None = None,
        use_async: bool = False,
    ) -> None:
        if name != "" and not (isinstance(name, str) and is_session_name(name)):
            raise UsageError(
                f"a Session cannot be called {name!r:.80}: use at most 64 letters, digits, -, _ "
                'and ., and no . first, as in Session(name="fold0", ...)'
            )
        if accumulation_steps < 1 or global_batch < 0 or (save_interval or 0) < 0:
            raise UsageError(
                "accumulation_steps must be at least 1, global_batch and save_interval at least 0"
            )
        if accumulation_steps > 1 and global_batch:
            raise UsageError("give accumulation_steps or global_batch, which sets it, but not both")
        if not isinstance(retention, Retention | None):
            raise UsageError(
                f"retention must be a Retention, as in Retention(last=2), not {retention!r}"
            )
        if engine is None:
            check_inputs(EngineInputs(booster, model, optimizer, lr_scheduler, use_async))
        self.state = SessionState()
        self._save_dir = save_dir
        self._name = name
        self._inputs = EngineInputs(booster, model, optimizer, lr_scheduler, use_async)
        self._engine = engine
        self._global_batch = global_batch
        self._save_interval = save_interval
        self._retention = retention
        self._consumption = Consumption()
        self._loop = LoopState(accumulation_steps, self._consumption)
        self._rank_state = RankState(check_extra(extra if extra is not None else {}), model)
        self._metrics = ReportedMetrics()
        self.resumed_from: Path | None = None
        self._hooks = ExitStack()  # on the model and the optimizers, while it is open

    def __enter__(self) -> Session:
        """Resume from the session's newest intact checkpoint.

        Raises:
            UsageError: another Session is open, or one of this name was entered before.
            NoUsableCheckpoint, UnsupportedFormat, CheckpointError: as ``load_newest`` does.
            LockHeld, DirectoryUnusable: without a supervisor, if the directory is in use.
        """
        runtime = self._runtime = runtimes.join(self._save_dir).of_session(self._name)
        runtime.state = self.state.encode_if_any
        slot = self._metrics.slot = runtime.slot
        slot.phase(Phase.LOADING)
        slot.session_stage(SessionStage.OPEN)
        engine = make_engine(self._inputs, self._engine)
        spec = runtime.supervised.spec if runtime.supervised else None
        steps = (spec.save_interval_steps if spec else 0) or self._save_interval
        runtime.automatic = steps is None
        global_batch = (spec.global_batch if spec else 0) or self._global_batch
        if self._retention is not None and not runtime.retain.rule:
            runtime.retain.rule = self._retention
        slot.session(self._name, wants_saves=runtime.automatic)
        interval = choose_interval(runtime, steps)
        if runtime.peers.is_leader:
            note_rule(runtime.job, runtime.retain.rule)
        self._saver = saver = Saver(runtime, engine, self._inputs.optimizer)
        self._timer = StepTimer(slot, self._inputs.model, consumption=self._consumption)
        inputs = self._inputs
        self._rank_state.settings = ScriptSettings(inputs.optimizer, inputs.lr_scheduler)
        found = load_newest(runtime, engine, self._resume)
        if found is not None:
            saver.resume(found)
        if not runtime.steps.has_stepped:  # a later session is not part of the recovery
            slot.loaded(found.source if found else Source.NOTHING)
        self._first_step = self.step
        runtime.steps.attach(self.step)
        self._points = SavePoints(
            runtime, saver, interval, self._timer, self._loop,
            self._rank_state, self._metrics, self._inputs.optimizer,
            lambda: _version(self._inputs.model),
            DigestChain(
                spec.digests if spec else 0, runtime.job, runtime.journal, runtime.peers.rank,
                self._inputs.model, self._inputs.optimizer,
            ),
        )  # fmt: skip
        self._data = DataLoop(
            runtime, self._points, self._timer, self._loop, self._rank_state,
            global_batch=global_batch, resumed_from=found.seal if found else None,
        )  # fmt: skip
        self._watch_optimizer()
        runtime.sessions.enter(self._name)
        slot.phase(Phase.BETWEEN)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Save once more if the script reached its end, or all ranks left by ``sys.exit(0)``; after
        any other exception nothing is saved.

        Raises:
            UnequalSteps: this rank left by ``sys.exit(0)``, and another one trains on.
        """
        try:
            self._close(error)
        finally:
            self._hooks.close()

    def _close(self, error: BaseException | None) -> None:
        runtime, points = self._runtime, self._points
        runtime.sessions.leave(saved=False)
        if runtime.has_left:
            return
        if error is not None and not is_exit(error):
            if not points.is_sealed:
                runtime.slot.session_stage(SessionStage.LEFT)
            return
        self._data.settle()
        if error is not None and not points.is_sealed:
            leave_together(runtime, self.step)
        points.finish()
        self._warn_if_stepless()
        runtime.sessions.leave(saved=points.is_saved)
        runtime.slot.phase(Phase.LEAVING)
        if error is not None and runtime.board.stop_wanted:  # a handler of its own may have left
            runtime.leave(saved=points.is_saved, together=False)

    @property
    def step(self) -> int:
        """Optimizer steps finished since the job began."""
        return self._loop.position.step

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self._loop.position.epoch

    @property
    def step_ends(self) -> bool:
        """Whether the optimizer steps with this micro-batch: it is the last of its group."""
        return self._loop.step_ends

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step; with a global batch, known inside ``batches``."""
        return self._loop.accumulation_steps

    def report(self, **metrics: float) -> None:
        """Report the model's metrics; each later checkpoint contains the newest values.

        Not collective: rank 0's values count, for retention by a metric. A ``loss`` that is
        infinite or NaN on any rank is a failure of this step.

        Raises:
            UsageError: a value is not a number.
            NonFiniteLoss: ``loss`` is not finite; the supervisor restarts from a checkpoint.
        """
        self._metrics.report(self.step + 1, metrics)

    def epochs(self, max_epochs: int) -> Iterator[int]:
        """Return the remaining epochs, starting with the one that was interrupted.

        A job that was saved at the last step of an epoch resumes in that epoch, with no batches
        left, so that what the script does at its end is done.
        """
        return self._data.epochs(max_epochs)

    def batches(self, *loaders: Any, position: str | None = None) -> Batches:
        """Return the remaining micro-batches of this epoch, once per epoch.

        Samples count as consumed when the script requests the next batch, whatever was
        prefetched. A group of micro-batches that the end of the epoch cuts short makes a shorter
        last step, or is left out if the sampler was given ``drop_last``. ``len()`` of the result is
        the number of batches that are left, where the loader tells.

        Args:
            loaders: a DataLoader with an ``ElasticSampler``, also within a ``BatchSampler``, whose
                place is exact for any number of ranks; or any loader with ``state_dict`` and
                ``load_state_dict``, whose own state each rank saves. With several, each batch is a
                tuple: the first one's length is the epoch's and counts steps, the others continue
                through the epochs and begin anew at their own end.
            position: for loaders without a state. ``"skip"``: they yield the same batches at each
                start, so the used ones are skipped after a restart. ``"approximate"``: they begin
                anew after a restart, which is said and recorded.

        Raises:
            UsageError: nothing tells a loader's place, or it has no fixed batch size.
            DataMismatch: the data or their order are not the checkpoint's, or a loader cannot
                continue.
            UnequalSteps: the ranks would run different numbers of steps.
            SystemExit: at the agreed stop step, after the seal.
        """
        if not loaders:
            raise UsageError("session.batches needs a loader: session.batches(loader)")
        return self._data.batches(loaders, position)

    @contextmanager
    def evaluation(self, *, interruptible: bool = False) -> Iterator[Evaluation]:
        """Run the body as an evaluation; not collective.

        The random state is restored afterwards, so that an evaluation does not change the
        training. A notice waits for its end.

        Args:
            interruptible: the body runs no collectives and may be left early: iterating through
                ``Evaluation.batches`` leaves it, and sets ``interrupted``.
        """
        steps = self._runtime.steps
        self._timer.interrupted()
        with evaluating(
            self._runtime.slot, lambda: steps.requested, interruptible=interruptible
        ) as evaluation:
            yield evaluation

    def _resume(self, found: Readable) -> str:
        seal, inexact = found.seal, self._rank_state.resume(found, self._runtime.peers)
        for line in self._rank_state.replaced:
            self._runtime.leader_says(line)
        self._loop.position = Position.of(seal)
        self._metrics.resume(seal.metrics)
        self.state.resume(read_session_state(found))
        self.resumed_from = self._runtime.job.checkpoint(seal.epoch, seal.step)
        return inexact

    def _watch_optimizer(self) -> None:
        inner = inner_optimizer(self._inputs.optimizer)
        self._consumption.gradients_seen = self._inputs.booster is None
        if hasattr(inner, "register_step_pre_hook"):
            hook = inner.register_step_pre_hook(lambda *_: self._timer.optimizing())
            self._hooks.callback(hook.remove)
        self._hooks.callback(self._timer.detach)
        self._hooks.callback(self._saver.detach)
        self._hooks.callback(self._consumption.unwatch)
        self._consumption.watch(inner, *self._rank_state.extra.values())
        given = (self._inputs.optimizer, *self._rank_state.extra.values())
        others = OtherOptimizers(self._inputs.model, given, self._runtime.leader_says)
        self._hooks.callback(others.close)

    def _warn_if_stepless(self) -> None:
        """Say so if the optimizer stepped and none of the steps was counted."""
        runtime, resumed = self._runtime, self._first_step
        if self.step == resumed and self._consumption.steps and runtime.peers.rank == 0:
            runtime.say(
                f"warning: the optimizer stepped {self._consumption.steps} times in this Session, "
                f"which has seen no step, {STEPLESS}"
            )


def _version(model: Any) -> int:
    """Return a number that changes when something writes to the model's tensors in place."""
    tensors = [*model.parameters(), *model.buffers()] if hasattr(model, "parameters") else []
    return sum(tensor._version for tensor in tensors if not tensor.is_inference())
