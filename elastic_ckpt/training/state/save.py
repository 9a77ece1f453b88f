"""One save, from all ranks' state to the seal.

Collective; an error on one rank becomes the same typed error on every rank.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.manifest import FileEntry, Reason, SealHeader
from elastic_ckpt.checkpoint.memory.seal import Share
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.nodes.tier import SharesAttempt
from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.checkpoint.tier import Attempt, Part, Ref
from elastic_ckpt.errors import (
    CheckpointRejected,
    ElasticCkptError,
    NodeLost,
    StateModified,
    StorageFailed,
    UsageError,
)
from elastic_ckpt.journal.events import Saved, SaveFailure, SaveStarted
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.protocol.slot import Phase
from elastic_ckpt.training.engines import Engine
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.state.snapshot import Snapshot, make_header
from elastic_ckpt.training.state.target import begin_attempt
from elastic_ckpt.training.tensors.device_copy import DeviceCopies
from elastic_ckpt.training.tensors.state_codec import write_state
from elastic_ckpt.util.files import files_below

log = logging.getLogger(__name__)

_TO_DISK: Final = ("emergency", "manual")
"""Saves that a process waits for go to disk at once: through memory they would take longer, unless
nodes that stay have what they need of an emergency save."""

_GRACE_SECONDS: Final = 1.0
"""What a copy to a node that stays may take more than twice what was expected."""

_Files = msgspec.json.Decoder(list[FileEntry])
_Paths = msgspec.json.Decoder(list[str])
_Owners = msgspec.json.Decoder(list[list[str]])
_Share = msgspec.json.Decoder(Share)
_Header = msgspec.json.Decoder(SealHeader)
_Last = msgspec.json.Decoder(tuple[list[Share], Retention])


@dataclass(frozen=True)
class _Taken:
    """A state that is written, or being copied, and not sealed yet; on the leader with the paths
    that each rank has written, encoded."""

    target: Attempt
    header: SealHeader
    writer: Part
    written: list[bytes]
    copies: DeviceCopies | None


def write_checkpoint(runtime: Runtime, engine: Engine, snapshot: Snapshot) -> Path:
    """Save, and return once the checkpoint is sealed. Collective.

    With a memory tier it is sealed in memory, survives any process of the job, and is copied to
    disk afterwards. Without one, or if a process waits for it, it is on disk.

    Raises:
        ElasticCkptError: on every rank, as the rank that failed first raised it.
        SaveFailed: likewise, for any other error; StorageFailed for an ``OSError``. In each case
            the job directory is as it was before.
    """
    SaveOperation(runtime, engine, snapshot).begin()
    return runtime.job.checkpoint(snapshot.position.epoch, snapshot.position.step)


class SaveOperation:
    """One save. ``begin`` and ``complete`` are collective and called once.

    After ``begin`` the save is complete, unless a device is still copying: then ``under_way`` is
    true on all ranks alike. The caller continues to compute, calls ``guard`` before it modifies
    what is being saved, and ``complete`` in the end.

    Attributes:
        parent: the attempt that it continues from.
        is_in_memory: whether it was sealed there.
    """

    is_in_memory = False

    def __init__(self, runtime: Runtime, engine: Engine, snapshot: Snapshot) -> None:
        self._runtime = runtime
        self._engine = engine
        self._snapshot = snapshot
        self.parent = runtime.parent
        self._to_disk = snapshot.reason in _TO_DISK
        self._hands_over = snapshot.reason == "emergency"
        self._refused = False  # by the disk
        self._taken: _Taken | None = None
        self._began = self._standing_since = time.monotonic()
        self._stall = 0.0

    @property
    def position(self) -> Position:
        """The position that is saved."""
        return self._snapshot.position

    @property
    def reason(self) -> Reason:
        """Why the save is made."""
        return self._snapshot.reason

    @property
    def under_way(self) -> bool:
        """Whether a device is still copying, so that ``complete`` must be called."""
        return self._taken is not None

    def begin(self, *, overlap: bool = False) -> None:
        """Save into memory if there is a tier, room and time, otherwise to disk; if that fails, to
        the other. In memory with ``overlap`` a device copies what it can until :meth:`complete`."""
        step, epoch = self.position.step, self.position.epoch
        log.info("saving step %d: %s", step, self.reason, extra={"step": step})
        with self._standing_still():
            if self._runtime.peers.is_leader:
                self._runtime.journal.note(SaveStarted(step=step, epoch=epoch, reason=self.reason))
            while not self._try(overlap):
                pass

    def guard(self) -> None:
        """Order the device's further work after its copies. Not collective."""
        if self._taken is not None and self._taken.copies is not None:
            self._taken.copies.guard()

    def complete(self) -> None:
        """Wait for the copies, and seal. StateModified if the state was modified without a
        ``guard``: nothing is saved. Otherwise raises as :func:`write_checkpoint`."""
        taken, self._taken = self._taken, None
        if taken is None:
            raise UsageError("call complete() once, after a begin() that left the save under way")
        with self._standing_still():
            try:
                self._finish(taken)
            except ElasticCkptError:
                self._drop(taken.target)
                raise

    # -- inside -------------------------------------------------------------------------------

    def _try(self, overlap: bool) -> bool:
        """Save to the current tier; return False to try the other one. Every rank sees the same
        errors, so all ranks do the same."""
        target: Attempt | None = None
        try:
            target = begin_attempt(
                self._runtime, self._engine, self.position.step, allow_memory=not self._to_disk,
                hands_over=self._hands_over, replaces=self._refused,
            )  # fmt: skip
            overlapped = overlap and target.ref.tier == "memory" and self._engine.overlaps
            copies = DeviceCopies() if overlapped else None
            taken = _write(self._runtime, self._engine, self._snapshot, target, copies)
            if overlapped:
                self._taken = taken
            else:
                self._finish(taken)
        except ElasticCkptError as error:
            self._drop(target)
            if not isinstance(error, StorageFailed) or not self._switch_tier(target, error):
                raise
            return False
        return True

    def _switch_tier(self, target: Attempt | None, refused: StorageFailed) -> bool:
        """Switch from the tier that failed to the other one; return False if there is none."""
        in_memory = target is not None and target.ref.tier == "memory"
        if in_memory and self._to_disk:
            self._hands_over = False
            what = "saving to the disk instead"
        elif in_memory:
            self._runtime.memory = None
            what = "the memory tier is off from now on"
        elif self._runtime.memory is not None and not self._refused:
            what = "saving into memory instead"
            self._to_disk, self._refused, self._hands_over = False, True, False
        else:
            return False
        log.warning("%s: %s", what, refused)
        self._runtime.leader_says(f"{what}: {refused}")
        return True

    def _finish(self, taken: _Taken) -> None:
        files, sealed = _seal(self._runtime, self._engine, taken)
        self._record(taken.target, sealed, sum(entry.bytes for entry in files))

    def _drop(self, target: Attempt | None) -> None:
        if target is not None and self._runtime.peers.is_leader:
            target.drop()

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Count the body as time in which training stands still."""
        runtime = self._runtime
        before = runtime.slot.posted_phase
        runtime.slot.phase(Phase.SAVING)
        self._standing_since = time.monotonic()
        try:
            yield
        except ElasticCkptError as error:
            log.warning("step %d could not be saved: %s", self.position.step, error)
            if runtime.peers.is_leader:
                runtime.journal.write(
                    SaveFailure(
                        step=self.position.step,
                        reason=self.reason,
                        error=str(error),
                        stall_seconds=self._stall + time.monotonic() - self._standing_since,
                    )
                )
            raise
        finally:
            runtime.slot.phase(before)
            self._stall += time.monotonic() - self._standing_since

    def _place(self, sealed: Ref | None) -> str:
        """Return where the checkpoint is, or will be once it is drained; for the leader."""
        durable = self._runtime.durable
        if sealed is not None and sealed.tier == durable.name:
            return durable.where(sealed)
        place = self._runtime.job.checkpoint(self.position.epoch, self.position.step)
        in_bucket = self._runtime.bucket is not None
        return f"{self._runtime.home}/{place.name}" if in_bucket else str(place)

    def _record(self, target: Attempt, sealed: Ref | None, size: int) -> None:
        runtime, step, now = self._runtime, self.position.step, time.monotonic()
        seconds = now - self._began
        runtime.last_bytes = size
        runtime.slot.saved(step)
        runtime.parent = target.ref.attempt
        self.is_in_memory = target.ref.tier == MemoryTier.name
        bytes_too = f", {size} bytes" if runtime.peers.is_leader else ""  # only the leader knows
        said = f"{target.ref.tier}, {seconds:.3f} s{bytes_too}"
        log.info("sealed step %d: %s", step, said, extra={"step": step})
        if not runtime.peers.is_leader:
            return
        runtime.journal.write(
            Saved(
                path=self._place(sealed),
                step=step,
                epoch=self.position.epoch,
                sample_start_index=self.position.sample_start_index,
                reason=self.reason,
                tier=target.ref.tier,
                attempt=target.ref.attempt,
                bytes=size,
                seconds=seconds,
                stall_seconds=self._stall + now - self._standing_since,
                world_size=runtime.peers.world_size,
                metrics=self._snapshot.metrics,
            )
        )
        # An emergency save ends this process; memory is pruned after its drain.
        if self.reason != "emergency" and target.ref.tier == "disk":
            runtime.retain.after_save()


def _write(
    runtime: Runtime,
    engine: Engine,
    snapshot: Snapshot,
    target: Attempt,
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
            if values := runtime.state():
                writer.write("session_state.json", values)
        return msgspec.json.encode(writer.paths)

    written = peers.collect("state", state, watched=True)
    header = make_header(runtime, engine.info, snapshot, target.ref.attempt)
    return _Taken(target, header, writer, written, copies)


def _seal(runtime: Runtime, engine: Engine, taken: _Taken) -> tuple[list[FileEntry], Ref | None]:
    """Return the files, and on the leader what was sealed."""
    peers, target = runtime.peers, taken.target

    def look() -> bytes:
        engine.check(target.path, peers.rank)
        if taken.copies is not None and not taken.copies.finish():
            raise StateModified(peers.rank, "a tensor was modified while it was copied")
        # On a shared file system each look at a directory takes a way over the network.
        return msgspec.json.encode(files_below(target.path) if engine.by_path else [])

    # Once all ranks have written, no file is created or removed any more.
    seen = peers.collect("seen", look)
    owners = owners_of([_Paths.decode(data) for data in taken.written], map(_Paths.decode, seen))
    unclaimed = _Owners.decode(peers.tell("owners", msgspec.json.encode(owners)))[peers.rank]

    def part() -> bytes:
        if isinstance(target, SharesAttempt):
            target.refuse_twins(map(_Paths.decode, data) for data in (taken.written, seen))
        for path in unclaimed:
            taken.writer.claim(path)
        header = taken.header if peers.is_leader else None
        return msgspec.json.encode(taken.writer.finish(peers.world_size, header))

    parts = peers.collect("part", part)
    files = [entry for data in parts for entry in _Files.decode(data)]
    if isinstance(target, SharesAttempt):
        header = _seal_shares(runtime, target, taken.header)
        if target.hands_over:
            _hand_over(runtime, target, header)
            return files, None
    return files, peers.leader_does(
        "seal", lambda: target.seal(taken.header, files, runtime.retain.rule)
    )


def _hand_over(runtime: Runtime, target: SharesAttempt, header: SealHeader) -> None:
    """Have nodes that stay keep the shares of those that leave, also of one whose notice came since
    the save began, and seal the last share. Collective. StorageFailed on every rank if a share is
    kept by no other node in twice the expected time, or half of the time that is left."""
    peers, deadline = runtime.peers, runtime.board.deadline
    kept: list[Share] = []

    def hand_over() -> bytes:
        if deadline is None or not target.acts:
            return b""
        now = time.monotonic()
        try:
            if target.seals:
                raise CheckpointRejected("this node leaves as well, and its seal is the last")
            patience = min((deadline - now) / 2, 2 * target.hand_over_seconds + _GRACE_SECONDS)
            kept.append(target.hand_over(now + patience))
        except (NodeLost, CheckpointRejected) as error:
            raise StorageFailed(peers.rank, f"its memory goes with its node: {error}") from None
        return msgspec.json.encode(kept[0])

    found = [_Share.decode(one) for one in peers.collect("kept", hand_over) if one]
    told = peers.tell("keepers", msgspec.json.encode((found, runtime.retain.rule)))
    keepers, retention = _Last.decode(told)

    def seal() -> bytes:
        if target.acts and target.seals:
            target.seal_last(header, retention, keepers)
        return b""

    peers.collect("seal", seal)
    for share in keepers:
        who = f"ranks {share.first} to {share.ranks[-1]}"
        runtime.leader_says(f"{who} leave: {share.host} keeps what they have saved in memory")
    if kept:
        target.note_keeper(kept[0].host)


def _seal_shares(runtime: Runtime, target: SharesAttempt, header: SealHeader) -> SealHeader:
    """Seal the share of each node but that of the last; return the leader's header. Collective."""
    told = _Header.decode(runtime.peers.tell("header", msgspec.json.encode(header)))

    def seal() -> bytes:
        if target.acts and not target.seals:
            target.seal_share(told)
        return b""

    runtime.peers.collect("share", seal)
    return told


def owners_of(written: Iterable[list[str]], seen: Iterable[list[str]]) -> list[list[str]]:
    """Return, for each rank, the files to claim that no rank wrote through its part.

    Such a file (an index, a configuration) goes to the first rank that sees it: the rank that wrote
    it does, while a network file system may show it to the others a minute later.
    """
    taken = {path for paths in written for path in paths}
    owners: list[list[str]] = []
    for paths in seen:
        mine = [path for path in paths if path not in taken]
        taken.update(mine)
        owners.append(mine)
    return owners
