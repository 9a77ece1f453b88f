"""``save_checkpoint`` and ``load_checkpoint``, and ``should_save`` for a script's own loop."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic_ckpt.checkpoint.colossalai_layout import RunningStates, read_running_states
from elastic_ckpt.checkpoint.manifest import Reason
from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.errors import CheckpointRejected, NoUsableCheckpoint
from elastic_ckpt.jobdir.paths import checkpoint_key
from elastic_ckpt.policy.interval import SaveInterval
from elastic_ckpt.protocol.agreement import ActionKind
from elastic_ckpt.protocol.slot import Source
from elastic_ckpt.training import runtime as runtimes
from elastic_ckpt.training.auto_interval import Interval, choose_interval
from elastic_ckpt.training.data.consumption import Consumption
from elastic_ckpt.training.data.data_pass import Resumed, current_pass, order_version, resume_at
from elastic_ckpt.training.data.postponement import MAX_HURRIED_TRIES, MAX_TRIES
from elastic_ckpt.training.engines import EngineInputs, make_engine
from elastic_ckpt.training.ranks.peers import Peers
from elastic_ckpt.training.session_inputs import check_extra
from elastic_ckpt.training.state.candidate import Loaded, Readable
from elastic_ckpt.training.state.load import load_given, load_newest
from elastic_ckpt.training.state.meeting import Arrival, meet
from elastic_ckpt.training.state.rank_state import RankState
from elastic_ckpt.training.state.save import write_checkpoint
from elastic_ckpt.training.state.snapshot import REASONS, Snapshot

log = logging.getLogger(__name__)


@dataclass
class _Loop:
    """State of ``should_save`` between calls."""

    calls: int = 0
    attached: bool = False
    interval: Interval | None = None  # of automatic saves
    notices: bool = False  # notice() agrees, not should_save()
    stop: bool = False
    reason: Reason = "interval"
    consumption: Consumption = field(default_factory=Consumption)
    optimizer_steps: int = 0  # at the last call
    tries: int = 0  # calls for which a save has waited for an optimizer step


_loop = _Loop()


def notice() -> bool:
    """Return whether to save and leave now. Call it once after every optimizer step.

    True on all ranks alike, after the same step: the machine goes away, or the job stops for
    another reason. For a script that saves by itself; one that calls ``should_save`` gets the same
    answer without a second agreement. A few microseconds while nothing is asked. Collective at the
    first call.

    Raises:
        StopAborted: a rank died during the agreement.
    """
    runtime = runtimes.joined()
    if _loop.attached and not _loop.notices:
        return _loop.stop  # should_save agrees
    if not _loop.attached:
        _loop.attached = _loop.notices = True
        runtime.steps.attach(0, declares=False)
    runtime.steps.stepped()
    _loop.calls += 1
    action = runtime.steps.enter(_loop.calls, comes_back=False)
    if action.kind is ActionKind.STOP:
        _loop.stop, _loop.reason = True, "emergency"
        runtime.told_to_stop = True
    return _loop.stop


def should_save(step: int, every: int | None = None, *, save_dir: str | None = None) -> bool:
    """Return whether to call ``save_checkpoint`` now. Call it after every optimizer step.

    True on all ranks alike: on the interval, when a save was requested, and at the agreed stop
    step, after which ``save_checkpoint`` ends the process; a script that saves by itself leaves
    then, as ``notice()`` tells. If the optimizer that was given to ``load_checkpoint`` has not
    stepped since the last call, the save waits for a call after which it has. Collective at the
    first call, where a save is due, and without a supervisor at some steps more.

    Args:
        step: the step's number in the script's own counting; only ``every`` uses it.
        every: steps between saves, 0 for none; by default as often as pays, and then only the
            newest two of these saves are kept. The supervisor's ``--save-interval`` overrides it.
        save_dir: needed only if ``ELASTIC_CKPT_DIR`` is not set and no other function of this
            package was called before.

    Raises:
        StopAborted: a rank died during the agreement.
    """
    runtime = runtimes.join(save_dir) if save_dir else runtimes.joined()
    override = runtime.supervised.spec.save_interval_steps if runtime.supervised else 0
    is_automatic = every is None and not override
    if is_automatic and _loop.interval is None:
        _loop.interval = choose_interval(runtime, None, "call should_save with every=")
        runtime.slot.session("", wants_saves=True)
    if not _loop.attached:
        _loop.attached = True
        runtime.steps.attach(0, declares=False)
    runtime.steps.stepped()
    _loop.calls += 1
    now = current_pass()
    epoch, samples = 0, 0
    if now is not None:
        now.stepped()
        epoch, samples = now.epoch, now.taken
    runtime.slot.own_step(step)
    action = runtime.steps.enter(_loop.calls, epoch, samples, comes_back=False)
    _loop.stop = _loop.stop or action.kind is ActionKind.STOP
    if _loop.stop or not _loop.tries:
        _loop.reason = "emergency" if _loop.stop else REASONS.get(action.kind, "interval")
    if is_automatic and _loop.interval is not None:
        due = _loop.interval.due(_loop.calls)
    else:
        due = SaveInterval(steps=override or every or 0).due(step)
    due = _loop.stop or action.kind is not ActionKind.GO or due or _loop.tries > 0
    steps, before = _loop.consumption.steps, _loop.optimizer_steps
    _loop.optimizer_steps = steps
    saves = due and _can_save(runtime.peers, step, has_stepped=steps > before)
    runtime.automatic = saves and is_automatic  # not what the script saves at other steps
    runtime.told_to_stop = saves and _loop.stop  # for a script that saves by itself
    return saves


def _can_save(peers: Peers, step: int, *, has_stepped: bool) -> bool:
    """Return on every rank whether the optimizer of each has stepped since the last call, so that
    no gradients are pending; else the save is due again at the next call. Collective."""
    if not _loop.consumption.watched:
        return True
    limit = MAX_HURRIED_TRIES if _loop.stop else MAX_TRIES
    ready = has_stepped or _loop.tries >= limit
    name = f"should_save after step {step}"
    if meet(peers, name, Arrival(Position(step=step), ready)) is not None:
        _loop.tries = 0
        return True
    _loop.tries += 1
    if _loop.tries == 2 and peers.is_leader:
        log.warning("should_save at step %d waits for an optimizer step", step)
    return False


def save_checkpoint(
    save_dir: str | os.PathLike[str],
    booster: Any,
    model: Any,
    optimizer: Any,
    lr_scheduler: Any,
    epoch: int,
    step: int,
    batch_size: int,
    coordinator: Any = None,
    *,
    engine: str | None = None,
    use_async: bool = False,
    extra: dict[str, Any] | None = None,
) -> None:
    """Save to ``save_dir/epoch-{epoch}_step-{step}``, and return once it is sealed. Collective.

    Safe for a step that exists already (it is replaced; one of an earlier run is superseded) or was
    left half-written. The first save after ``load_checkpoint`` of an older checkpoint supersedes
    the newer ones.
    At an agreed stop, see ``should_save``, it ends the process after the seal.

    Args:
        booster: a ColossalAI ``Booster``, or None for plain torch.
        epoch: the epoch that the loop is in, also at its end.
        step: optimizer steps, in the script's own counting.
        batch_size: samples per optimizer step of one data-parallel rank, with accumulation.
        coordinator: ignored; ColossalChat's function has it.
        engine: as in ``Session``.
        use_async: have TensorNVMe write, if it is installed; the seal still waits for it.
        extra: as in ``Session``: further objects with a state, such as a GradScaler or an EMA.

    With this package's ``StatefulDistributedSampler`` the position in the data follows from what it
    yielded and ``should_save`` counted. With another sampler it is ``step * batch_size``, which is
    right if steps are counted from the start of the epoch.

    Raises:
        UsageError: the epoch or the batch size contradicts the sampler.
        UnequalSteps, DataMismatch: on every rank; the ranks are not at the same position.
        SaveFailed: on every rank, with the reason of the rank that failed. StorageFailed, if the
            disk is full or does not answer: a loop may catch it and continue.
        SystemExit: after the seal, at the agreed stop step.
    """
    runtime = runtimes.join(save_dir)
    peers = runtime.peers
    replicas = _data_parallel_size(booster, peers.world_size)
    now = current_pass()
    if now is None:
        samples, seed, size = step * batch_size * replicas, None, 0
    else:
        samples, seed, size = now.used(epoch, batch_size), now.order_seed, now.size
    position = Position(
        epoch=epoch,
        step=step,
        step_in_epoch=now.steps_before + now.steps if now is not None else step,
        sample_start_index=samples,
        order_seed=seed,
        order_version=order_version(),
        dataset_size=size,
    )
    own = RankState(check_extra(extra or {}), model)
    held = own.hold()
    compared = held.digests() if peers.world_size > 1 else ()
    name = f"the save after step {step}, epoch {epoch}"
    unequal = meet(peers, name, Arrival(position, True, *compared)) or frozenset()
    snapshot = Snapshot(
        reason=_loop.reason,
        position=position,
        running_states={"epoch": epoch, "step": step, "sample_start_index": samples // replicas},
        samples_per_step=batch_size * replicas,
        data_parallel_size=replicas,
        rank_state=lambda: own.capture(peers.rank, held, unequal, iterating=True),
    )
    inputs = EngineInputs(booster, model, optimizer, lr_scheduler, use_async)
    write_checkpoint(runtime, make_engine(inputs, engine), snapshot)
    runtime.automatic = False
    if _loop.stop:
        runtime.leave(saved=True)


def load_checkpoint(
    load_dir: str | os.PathLike[str],
    booster: Any,
    model: Any,
    optimizer: Any,
    lr_scheduler: Any,
    *,
    engine: str | None = None,
    extra: dict[str, Any] | None = None,
) -> tuple[int, int, int]:
    """Verify every byte of a checkpoint, then load it. Collective.

    Args:
        load_dir: one checkpoint, or a job directory, from which the newest intact one is loaded;
            newer ones that fail verification are set aside.
        engine: as in ``Session``.
        extra: what ``save_checkpoint`` is given; restored in place.

    The random state is restored; with ``StatefulDistributedSampler`` again when the first pass
    begins, so that what creating a DataLoader's iterator draws does not matter.

    Returns:
        (epoch, step, sample_start_index). The index counts samples of one data-parallel rank of
        this run, whatever their number at the save. (0, 0, 0), with nothing loaded, for a job
        directory without a checkpoint.

    Raises:
        CheckpointRejected: the checkpoint failed verification.
        ElasticCkptError: it was saved without an object of ``extra``.
        NoUsableCheckpoint: ``load_dir`` does not exist, or none of its checkpoints is usable.
    """
    path = Path(load_dir).resolve()
    single = checkpoint_key(path.name) is not None
    if not path.exists() and os.environ.get("ELASTIC_CKPT_DIR") != os.fspath(load_dir):
        raise NoUsableCheckpoint(
            f"{path} does not exist: pass a checkpoint or a job directory; for a new job, create it"
        )
    runtime = runtimes.join(path.parent if single else path)
    own = RankState(check_extra(extra or {}), model)
    _loop.consumption.watch(optimizer, *own.extra.values())
    made = make_engine(EngineInputs(booster, model, optimizer, lr_scheduler), engine)

    read: list[RunningStates] = []

    def resume(found: Readable) -> str:
        try:  # the files of what is in memory are gone once it is loaded
            read.append(read_running_states(found.path))
        except CheckpointRejected as error:
            raise CheckpointRejected(f"{found.seal.checkpoint_name}: {error}") from None
        return own.resume(found, runtime.peers)

    if single:
        loaded: Loaded | None = load_given(runtime, made, path, resume)
    else:
        loaded = load_newest(runtime, made, resume)
    runtime.slot.loaded(loaded.source if loaded else Source.NOTHING)
    if loaded is None:
        return 0, 0, 0
    running, seal = read[-1], loaded.seal
    place = Resumed(
        running.epoch,
        seal.sample_start_index,
        seal.step_in_epoch,
        seal.dataset_size,
        seal.order_seed,
        seal.order_version,
    )
    own.restore_rng(keep=True)
    resume_at(place, own.restore_rng)
    replicas = _data_parallel_size(booster, runtime.peers.world_size)
    return place.epoch, running.step, place.per_rank(replicas)


def _data_parallel_size(booster: Any, world_size: int) -> int:
    """Return the number of ranks that see different samples, as the plugin's own loader has it.

    A hybrid plugin's ``dp_size`` also counts ranks that share a sample by sequence parallelism;
    LowLevelZero's ``dp_group`` omits those of ``extra_dp_size``.
    """
    plugin: Any = getattr(booster, "plugin", None)
    if hasattr(plugin, "pp_group"):
        return int(plugin.dp_group.size())
    return int(getattr(plugin, "dp_size", 0) or world_size)
