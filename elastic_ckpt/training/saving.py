"""One save, from all ranks' state to the seal.

Collective, and an error on one rank becomes the same typed error on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

import msgspec
import torch

from elastic_ckpt.board import Phase
from elastic_ckpt.core.manifest import EngineInfo, FileEntry, Reason, SealHeader
from elastic_ckpt.core.position import Position
from elastic_ckpt.core.retention import Retention
from elastic_ckpt.errors import SaveFailed, StorageFailed
from elastic_ckpt.store.attempt import Attempt
from elastic_ckpt.store.catalog import newest_valid
from elastic_ckpt.store.files import files_below
from elastic_ckpt.store.part import Part
from elastic_ckpt.store.space import ensure_space
from elastic_ckpt.training.engines import Engine
from elastic_ckpt.training.memory_target import MemoryTarget
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.state_codec import write_state

_MARGIN: Final = 1.05
"""What the next checkpoint may be larger than the last one."""

_Files = msgspec.json.Decoder(list[FileEntry])


_Paths = msgspec.json.Decoder(list[str])
_Owners = msgspec.json.Decoder(list[list[str]])


@dataclass(frozen=True)
class Snapshot:
    """What a save is told besides the state itself.

    Attributes:
        reason: why it is made.
        position: where in the data the job is.
        running_states: contents of ``running_states.json``, in the seed's keys and units.
        samples_per_step: samples of one step on all ranks together; 0 if unknown.
        data_parallel_size: ranks that see different samples.
        rank_state: this rank's own state; called while saving, None to save none.
        metrics: what the script reported, for retention.
    """

    reason: Reason
    position: Position
    running_states: dict[str, int]
    samples_per_step: int = 0
    data_parallel_size: int = 1
    rank_state: Callable[[], dict[str, Any]] | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _DiskTarget:
    """One save straight to the disk."""

    attempt: Attempt
    tier: ClassVar[str] = "disk"

    @property
    def identity(self) -> str:
        return self.attempt.identity

    @property
    def path(self) -> Path:
        return self.attempt.path

    @property
    def told(self) -> str:
        return f"disk - {self.identity}"

    def part(self, rank: int) -> Part:
        return self.attempt.part(rank)

    def seal(self, header: SealHeader, files: Sequence[FileEntry], _: Retention) -> None:
        self.attempt.seal(header, files)

    def drop(self) -> None:
        self.attempt.drop()


_Target = _DiskTarget | MemoryTarget


@dataclass(frozen=True)
class _Saved:
    path: Path
    tier: str
    bytes: int


def write_checkpoint(runtime: Runtime, engine: Engine, snapshot: Snapshot) -> Path:
    """Save, and return once the checkpoint is sealed. Collective.

    With a memory tier it is sealed in memory, survives any process of the job, and is on its way
    to the disk; without one it is on the disk.

    Raises:
        SaveFailed: on every rank, with the reason of the rank that failed first; StorageFailed
            if it was the storage's. The job directory is as it was before.
    """
    peers, began = runtime.peers, time.monotonic()
    before = runtime.slot.phase(Phase.SAVING)
    try:
        saved = _save(runtime, engine, snapshot)
    except SaveFailed as error:
        if peers.is_leader:
            runtime.journal.write(
                "save_failed",
                step=snapshot.position.step,
                reason=snapshot.reason,
                error=str(error),
            )
        raise
    finally:
        runtime.slot.phase(before)
    seconds = time.monotonic() - began
    runtime.slot.saved(snapshot.position.step, saved.bytes, int(seconds * 1e9))
    if peers.is_leader:
        runtime.journal.write(
            "saved",
            path=str(saved.path),
            step=snapshot.position.step,
            reason=snapshot.reason,
            tier=saved.tier,
            bytes=saved.bytes,
            seconds=seconds,
            stall_seconds=seconds,
        )
        # An emergency save ends this process; what is in memory is pruned behind its drain.
        if snapshot.reason != "emergency" and saved.tier == "disk":
            runtime.retain.after_save()
    return saved.path


def _save(runtime: Runtime, engine: Engine, snapshot: Snapshot) -> _Saved:
    """Into memory where there is a tier and room in it, else to the disk."""
    while True:
        target = _begin(runtime, engine, snapshot.position.step)
        try:
            return _write(runtime, engine, snapshot, target)
        except SaveFailed as error:
            if runtime.peers.is_leader:
                target.drop()
            if runtime.memory is None or not isinstance(error, StorageFailed):
                raise
            # Every rank has the same error, and so goes the same way.
            runtime.memory = None
            if runtime.peers.is_leader:
                runtime.say(f"no memory tier from here on: {error}")


def _begin(runtime: Runtime, engine: Engine, step: int) -> _Target:
    def begin() -> _Target:
        if not runtime.job.attempts.is_dir():
            runtime.job.prepare()  # somebody moved it; there is work to be kept
        needed = _predicted_bytes(runtime, engine)
        if runtime.memory is not None:
            target, line = runtime.memory.begin(needed)
            if line:
                runtime.say(line)
            if target is not None:
                return target
        ensure_space(runtime.job.root, needed, runtime.retain.make_room)
        return _DiskTarget(Attempt.begin(runtime.job, step))

    made = runtime.peers.leader_does("begin", begin)
    told = runtime.peers.tell("attempt", (made.told if made else "").encode()).decode()
    if made is not None:
        return made
    tier, slot, identity = told.split(" ")
    if tier == "memory" and runtime.memory is not None:
        return runtime.memory.target(slot, identity)
    return _DiskTarget(Attempt(runtime.job, identity, step))


def _predicted_bytes(runtime: Runtime, engine: Engine) -> int:
    """What the last checkpoint took, and at least what the leader's own tensors take."""
    newest = newest_valid(runtime.job)
    last = newest.manifest.total_bytes if newest and newest.manifest else 0
    return int(_MARGIN * max(last, engine.state_bytes()))


def _write(runtime: Runtime, engine: Engine, snapshot: Snapshot, attempt: _Target) -> _Saved:
    peers = runtime.peers
    header = _header(runtime, engine.info, snapshot, attempt)
    writer: Part = attempt.part(peers.rank)

    def state() -> bytes:
        engine.save(attempt.path, writer)
        if snapshot.rank_state is not None:
            write_state(writer, f"ranks/{peers.rank:05d}", snapshot.rank_state())
        if peers.is_leader:
            writer.write("running_states.json", msgspec.json.encode(snapshot.running_states))
        return msgspec.json.encode(writer.paths)

    written = peers.collect("state", state, watched=True)
    # Behind that nobody writes any more, so that no file which is seen goes away again.
    seen = peers.collect("seen", lambda: msgspec.json.encode(files_below(attempt.path)))
    owners = _owners([_Paths.decode(data) for data in written], map(_Paths.decode, seen))
    unclaimed = _Owners.decode(peers.tell("owners", msgspec.json.encode(owners)))[peers.rank]

    def part() -> bytes:
        return msgspec.json.encode(
            _finish_part(writer, unclaimed, peers.world_size, header if peers.is_leader else None)
        )

    parts = peers.collect("part", part)
    files = [entry for data in parts for entry in _Files.decode(data)]
    peers.leader_does("seal", lambda: attempt.seal(header, files, runtime.retain.rule))
    path = runtime.job.checkpoint(header.epoch, header.step)
    return _Saved(path, attempt.tier, sum(entry.bytes for entry in files))


def _owners(written: Iterable[list[str]], seen: Iterable[list[str]]) -> list[list[str]]:
    """For each rank, the files that it claims though nobody says to have written them.

    Such a file (an index, a configuration) goes to the first rank that sees it: the one that
    wrote it does, while a network file system may show it to the others a minute later.
    """
    taken = {path for paths in written for path in paths}
    owners: list[list[str]] = []
    for paths in seen:
        mine = [path for path in paths if path not in taken]
        taken.update(mine)
        owners.append(mine)
    return owners


def _finish_part(
    writer: Part,
    unclaimed: Sequence[str],
    world_size: int,
    header: SealHeader | None,
) -> list[FileEntry]:
    for path in unclaimed:
        writer.claim(path)
    return writer.finish(world_size, header)


def _header(
    runtime: Runtime, engine: EngineInfo, snapshot: Snapshot, attempt: _Target
) -> SealHeader:
    position = snapshot.position
    return SealHeader(
        job=runtime.name,
        attempt=attempt.identity,
        incarnation=runtime.incarnation,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        reason=snapshot.reason,
        epoch=position.epoch,
        step=position.step,
        step_in_epoch=position.step_in_epoch,
        sample_start_index=position.sample_start_index,
        samples_per_step=snapshot.samples_per_step,
        order_seed=position.order_seed,
        dataset_fingerprint=position.dataset_fingerprint,
        dataset_size=position.dataset_size,
        world_size=runtime.peers.world_size,
        data_parallel_size=snapshot.data_parallel_size,
        engine=engine,
        torch=str(torch.__version__),
        metrics=snapshot.metrics,
    )
