"""The seed's two functions, and ``should_save`` for loops that keep their own shape."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic_ckpt.checkpoint.colossalai_layout import read_running_states
from elastic_ckpt.checkpoint.manifest import Reason
from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.errors import CheckpointRejected, NoUsableCheckpoint
from elastic_ckpt.jobdir.paths import checkpoint_key
from elastic_ckpt.policy.interval import SaveInterval
from elastic_ckpt.protocol.agreement import ActionKind
from elastic_ckpt.protocol.slot import Source
from elastic_ckpt.training import runtime as runtimes
from elastic_ckpt.training.data.data_pass import Resumed, current_pass, resume_at
from elastic_ckpt.training.engines import EngineInputs, make_engine
from elastic_ckpt.training.state.load import load_given, load_newest
from elastic_ckpt.training.state.rank_state import RankState
from elastic_ckpt.training.state.save import write_checkpoint
from elastic_ckpt.training.state.snapshot import REASONS, Snapshot


@dataclass
class _Loop:
    """What ``should_save`` remembers between calls."""

    calls: int = 0
    attached: bool = False
    stop: bool = False
    reason: Reason = "interval"
    rank_state: RankState = field(default_factory=lambda: RankState({}))


_loop = _Loop()


def should_save(step: int, every: int = 0, *, save_dir: str | None = None) -> bool:
    """Whether to call ``save_checkpoint`` now. Call once at the end of every optimizer step.

    True on all ranks alike: on the interval, when a save was asked for, and at the agreed stop
    step, after which ``save_checkpoint`` leaves the process. Not collective after the first call.

    Args:
        step: the step's number in the script's own counting; only ``every`` looks at it.
        every: steps between saves, 0 for none; the supervisor's ``--save-interval`` goes before it.
        save_dir: needed only when neither ``ELASTIC_CKPT_DIR`` is set nor a function of this
            package was called before.

    Raises:
        StopAborted: a rank died during the agreement.
    """
    runtime = runtimes.join(save_dir) if save_dir else runtimes.joined()
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
    runtime.slot.counts(step)
    action = runtime.steps.enter(_loop.calls, epoch, samples, comes_back=False)
    _loop.stop = _loop.stop or action.kind is ActionKind.STOP
    _loop.reason = "emergency" if _loop.stop else REASONS.get(action.kind, "interval")
    told = runtime.supervised.save_interval_steps if runtime.supervised else 0
    due = SaveInterval(steps=told or every).due(step)
    return _loop.stop or action.kind is not ActionKind.GO or due


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
) -> None:
    """Save to ``save_dir/epoch-{epoch}_step-{step}``; returns once it is sealed. Collective.

    Safe for a step that exists already (an intact checkpoint is kept) or was left half-written.
    When a stop was agreed upon, see ``should_save``, it leaves the process after the seal.

    Args:
        booster: a ColossalAI ``Booster``, or None for plain torch.
        epoch: the epoch that the loop is in; at its end, too.
        step: optimizer steps, in the script's own counting.
        batch_size: samples per optimizer step of one data-parallel rank: times the accumulation.
        coordinator: not looked at, as the ranks are known; ColossalChat's function has it.
        engine: as in ``Session``.
        use_async: have TensorNVMe write, if it is installed; the seal comes behind it.

    With this package's ``StatefulDistributedSampler`` the place in the data is what it has given
    out and ``should_save`` has counted; with another one it is ``step * batch_size``, which is
    right where steps are counted from the epoch's begin.

    Raises:
        UsageError: epoch or batch size are not what the sampler says.
        SaveFailed: on every rank, with the reason of the rank that failed. StorageFailed, if the
            disk is full or does not answer: a loop that catches it may train on.
        SystemExit: after the seal, at the agreed stop step.
    """
    runtime = runtimes.join(save_dir)
    replicas = _data_parallel_size(booster, runtime.peers.world_size)
    now = current_pass()
    if now is None:
        samples, seed, size = step * batch_size * replicas, None, 0
    else:
        samples, seed, size = now.used(epoch, batch_size), now.order_seed, now.size
    snapshot = Snapshot(
        reason=_loop.reason,
        position=Position(
            epoch=epoch,
            step=step,
            step_in_epoch=now.steps_before + now.steps if now is not None else step,
            sample_start_index=samples,
            order_seed=seed,
            dataset_size=size,
        ),
        running_states={"epoch": epoch, "step": step, "sample_start_index": samples // replicas},
        samples_per_step=batch_size * replicas,
        data_parallel_size=replicas,
        rank_state=lambda: RankState({}).capture(iterating=True),
    )
    inputs = EngineInputs(booster, model, optimizer, lr_scheduler, use_async)
    write_checkpoint(runtime, make_engine(inputs, engine), snapshot)
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
) -> tuple[int, int, int]:
    """Verify in full, then load. Collective.

    Args:
        load_dir: one checkpoint, or a job directory: then the newest intact one is taken, and a
            bad one that is newer is set aside.
        engine: as in ``Session``.

    The random state is put back; with ``StatefulDistributedSampler`` once more when the first pass
    begins, so that what making a DataLoader's iterator draws does not count.

    Returns:
        (epoch, step, sample_start_index); the index counts samples of one data-parallel rank of
        this run, however many there were when it was saved. (0, 0, 0), with nothing loaded, for a
        job directory that holds no checkpoint yet.

    Raises:
        CheckpointRejected: the checkpoint is not whole.
        NoUsableCheckpoint: ``load_dir`` does not exist, or holds checkpoints of which none can be
            used.
    """
    path = Path(load_dir).resolve()
    single = checkpoint_key(path.name) is not None
    if not path.exists() and os.environ.get("ELASTIC_CKPT_DIR") != os.fspath(load_dir):
        raise NoUsableCheckpoint(
            f"{path} does not exist: give a checkpoint or a job's directory; make it for a new job"
        )
    runtime = runtimes.join(path.parent if single else path)
    made = make_engine(EngineInputs(booster, model, optimizer, lr_scheduler), engine)
    loaded = load_given(runtime, made, path) if single else load_newest(runtime, made)
    runtime.slot.loaded(loaded.source if loaded else Source.NOTHING)
    if loaded is None:
        return 0, 0, 0
    try:
        running = read_running_states(loaded.path)
    except CheckpointRejected as error:
        raise CheckpointRejected(f"{loaded.seal.checkpoint_name}: {error}") from None
    seal = loaded.seal
    place = Resumed(
        running.epoch,
        seal.sample_start_index,
        seal.step_in_epoch,
        seal.dataset_size,
        seal.order_seed,
    )
    _loop.rank_state.resume(loaded, runtime.peers.rank)
    _loop.rank_state.restore_rng(keep=True)
    resume_at(place, _loop.rank_state.restore_rng)
    replicas = _data_parallel_size(booster, runtime.peers.world_size)
    return place.epoch, running.step, place.per_rank(replicas)


def _data_parallel_size(booster: Any, world_size: int) -> int:
    """How many ranks see different samples: as many as a plugin's own loader makes shares.

    A hybrid plugin's ``dp_size`` counts ranks, too, that share a sample by sequence parallelism;
    LowLevelZero's ``dp_group`` leaves out those of ``extra_dp_size``.
    """
    plugin: Any = getattr(booster, "plugin", None)
    if hasattr(plugin, "pp_group"):
        return int(plugin.dp_group.size())
    return int(getattr(plugin, "dp_size", 0) or world_size)
