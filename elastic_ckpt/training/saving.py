"""One save, from all ranks' state to the seal.

Collective, and an error on one rank becomes the same typed error on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

import msgspec
import torch

from elastic_ckpt.board import Phase
from elastic_ckpt.core.agreement import ActionKind
from elastic_ckpt.core.manifest import EngineInfo, FileEntry, Reason, SealHeader
from elastic_ckpt.core.position import Position
from elastic_ckpt.core.retention import Retention
from elastic_ckpt.errors import ElasticCkptError, StateChanged, StorageFailed, UsageError
from elastic_ckpt.store.attempt import Attempt
from elastic_ckpt.store.catalog import newest_valid
from elastic_ckpt.store.files import files_below
from elastic_ckpt.store.part import Part
from elastic_ckpt.store.space import ensure_space
from elastic_ckpt.training.device_copy import DeviceCopies
from elastic_ckpt.training.engines import Engine
from elastic_ckpt.training.memory_target import MemoryTarget, WorkerMemory
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.state_codec import write_state

_MARGIN: Final = 1.05
"""What the next checkpoint may be larger than the last one."""

REASONS: Final[dict[ActionKind, Reason]] = {
    ActionKind.SAVE: "interval",
    ActionKind.SAVE_NOW: "manual",
    ActionKind.STOP: "emergency",
}
"""Why a save is made that all ranks agreed upon."""

_STRAIGHT: Final = ("emergency", "manual")
"""What somebody waits for is written to the disk at once: through memory it would take longer."""

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
class _Taken:
    """A state that is written, or on its way, and waits for its seal.

    Attributes:
        written: what each rank says to have written; on the leader alone.
        copies: what a device still has to copy; None if it has nothing.
    """

    target: _Target
    header: SealHeader
    writer: Part
    written: list[bytes]
    copies: DeviceCopies | None


def write_checkpoint(runtime: Runtime, engine: Engine, snapshot: Snapshot) -> Path:
    """Save, and return once the checkpoint is sealed. Collective.

    With a memory tier it is sealed in memory, survives any process of the job, and is on its way
    to the disk; without one, or if somebody waits for it, it is on the disk.

    Raises:
        ElasticCkptError: on every rank, as the rank that failed first raised it.
        SaveFailed: likewise, where that was another error; StorageFailed if it was the storage's.
            The job directory is as it was before in each case.
    """
    save = Save(runtime, engine, snapshot)
    save.begin()
    return save.complete()


class Save:
    """One save, in two halves. Each is collective, and called once.

    Between them tensors of a device may still be on their way into memory: ``under_way`` says so,
    on all ranks alike. The caller computes on, and calls ``guard`` before it may write to them.
    """

    def __init__(self, runtime: Runtime, engine: Engine, snapshot: Snapshot) -> None:
        self._runtime = runtime
        self._engine = engine
        self._snapshot = snapshot
        self._taken: _Taken | None = None
        self._began = time.monotonic()
        self._stall = 0.0

    @property
    def position(self) -> Position:
        """What is saved."""
        return self._snapshot.position

    @property
    def reason(self) -> Reason:
        """Why it is made."""
        return self._snapshot.reason

    @property
    def under_way(self) -> bool:
        """Whether a device may still be copying."""
        return self._taken is not None and self._taken.copies is not None

    def begin(self, *, overlap: bool = False) -> None:
        """Take the state; into memory where there is a tier, room and time, else to the disk.

        Args:
            overlap: leave to :meth:`complete` what a device can copy by itself, if it goes into
                memory.

        Raises:
            ElasticCkptError: as :func:`write_checkpoint`.
        """
        straight = self._snapshot.reason in _STRAIGHT
        with self._standing_still():
            while self._taken is None:
                try:
                    self._taken = self._take(straight, overlap)
                except StorageFailed as error:
                    # Every rank has the same error, and so goes the same way.
                    if not straight or self._runtime.memory is None:
                        raise
                    straight = False
                    self._say(f"saving into memory instead: {error}")

    def guard(self) -> None:
        """What a device is told from now on comes behind its copies. Not collective."""
        if self._taken is not None and self._taken.copies is not None:
            self._taken.copies.guard()

    def complete(self) -> Path:
        """Seal it.

        Raises:
            StateChanged: the state was written to without a ``guard``; nothing is saved.
            ElasticCkptError: as :func:`write_checkpoint`.
        """
        taken, self._taken = self._taken, None
        if taken is None:
            raise UsageError("complete() comes once, behind begin()")
        with self._standing_still():
            try:
                files = _seal(self._runtime, taken)
            except ElasticCkptError:
                self._drop(taken.target)
                raise
        self._tell(taken, sum(entry.bytes for entry in files))
        return self._runtime.job.checkpoint(self.position.epoch, self.position.step)

    # -- inside -------------------------------------------------------------------------------

    def _take(self, straight: bool, overlap: bool) -> _Taken:
        """Write the state once: to the disk, or into memory and to the disk if that fails."""
        runtime = self._runtime
        while True:
            target = _begin(
                runtime, self._engine, self._snapshot, None if straight else runtime.memory
            )
            behind = overlap and target.tier == "memory" and self._engine.overlaps
            try:
                copies = DeviceCopies() if behind else None
                return _write(runtime, self._engine, self._snapshot, target, copies)
            except ElasticCkptError as error:
                self._drop(target)
                if target.tier == "disk" or not isinstance(error, StorageFailed):
                    raise
                runtime.memory = None
                self._say(f"no memory tier from here on: {error}")

    def _drop(self, target: _Target) -> None:
        if self._runtime.peers.is_leader:
            target.drop()

    def _say(self, line: str) -> None:
        if self._runtime.peers.is_leader:
            self._runtime.say(line)

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Training stands still for what is inside."""
        runtime, began = self._runtime, time.monotonic()
        before = runtime.slot.phase(Phase.SAVING)
        try:
            yield
        except ElasticCkptError as error:
            if runtime.peers.is_leader:
                runtime.journal.write(
                    "save_failed",
                    step=self.position.step,
                    reason=self._snapshot.reason,
                    error=str(error),
                )
            raise
        finally:
            runtime.slot.phase(before)
            self._stall += time.monotonic() - began

    def _tell(self, taken: _Taken, size: int) -> None:
        runtime, step, reason = self._runtime, self.position.step, self._snapshot.reason
        runtime.slot.saved(step, size, int(self._stall * 1e9))
        if not runtime.peers.is_leader:
            return
        runtime.journal.write(
            "saved",
            path=str(runtime.job.checkpoint(self.position.epoch, step)),
            step=step,
            reason=reason,
            tier=taken.target.tier,
            bytes=size,
            seconds=time.monotonic() - self._began,
            stall_seconds=self._stall,
        )
        # An emergency save ends this process; what is in memory is pruned behind its drain.
        if reason != "emergency" and taken.target.tier == "disk":
            runtime.retain.after_save()


def _begin(
    runtime: Runtime, engine: Engine, snapshot: Snapshot, memory: WorkerMemory | None
) -> _Target:
    step = snapshot.position.step

    def begin() -> _Target:
        if not runtime.job.attempts.is_dir():
            runtime.job.prepare()  # somebody moved it; there is work to be kept
        needed = _predicted_bytes(runtime, engine)
        if memory is not None:
            target, line = memory.begin(needed)
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
    if tier == "memory" and memory is not None:
        return memory.target(slot, identity)
    return _DiskTarget(Attempt(runtime.job, identity, step))


def _predicted_bytes(runtime: Runtime, engine: Engine) -> int:
    """What the last checkpoint took, and at least what the leader's own tensors take."""
    newest = newest_valid(runtime.job)
    last = newest.manifest.total_bytes if newest and newest.manifest else 0
    return int(_MARGIN * max(last, engine.state_bytes()))


def _write(
    runtime: Runtime,
    engine: Engine,
    snapshot: Snapshot,
    target: _Target,
    copies: DeviceCopies | None,
) -> _Taken:
    peers = runtime.peers
    writer: Part = target.part(peers.rank)

    def state() -> bytes:
        engine.save(target.path, writer, copies)
        if snapshot.rank_state is not None:
            write_state(writer, f"ranks/{peers.rank:05d}", snapshot.rank_state())
        if peers.is_leader:
            writer.write("running_states.json", msgspec.json.encode(snapshot.running_states))
        return msgspec.json.encode(writer.paths)

    written = peers.collect("state", state, watched=True)
    header = _header(runtime, engine.info, snapshot, target)
    return _Taken(target, header, writer, written, copies)


def _seal(runtime: Runtime, taken: _Taken) -> list[FileEntry]:
    peers, target = runtime.peers, taken.target

    def look() -> bytes:
        if taken.copies is not None and not taken.copies.finish():
            raise StateChanged(peers.rank, "a tensor was written to while it was copied")
        return msgspec.json.encode(files_below(target.path))

    # Behind `written` nobody makes files any more, so that none which is seen goes away again.
    seen = peers.collect("seen", look)
    owners = _owners([_Paths.decode(data) for data in taken.written], map(_Paths.decode, seen))
    unclaimed = _Owners.decode(peers.tell("owners", msgspec.json.encode(owners)))[peers.rank]

    def part() -> bytes:
        header = taken.header if peers.is_leader else None
        return msgspec.json.encode(_finish_part(taken.writer, unclaimed, peers.world_size, header))

    parts = peers.collect("part", part)
    files = [entry for data in parts for entry in _Files.decode(data)]
    peers.leader_does("seal", lambda: target.seal(taken.header, files, runtime.retain.rule))
    return files


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
