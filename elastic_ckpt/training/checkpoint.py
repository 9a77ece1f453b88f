"""One save, from all ranks' state to the seal; one load, from the choice to the state.

Both are collective, and an error on one rank becomes a typed error on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from elastic_ckpt.board import Phase
from elastic_ckpt.core.manifest import (
    EngineInfo,
    FileEntry,
    Manifest,
    Reason,
    SealHeader,
)
from elastic_ckpt.core.position import Position
from elastic_ckpt.errors import (
    CheckpointError,
    CheckpointRejected,
    ElasticCkptError,
    NotSealed,
    NoValidCheckpoint,
    SaveFailed,
)
from elastic_ckpt.store.attempt import Attempt
from elastic_ckpt.store.catalog import candidates
from elastic_ckpt.store.files import files_below, write_atomic
from elastic_ckpt.store.quarantine import set_aside
from elastic_ckpt.store.verify import read_manifest, verify_files
from elastic_ckpt.training.engines import Engine
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.state_codec import read_state, write_state

MAX_QUARANTINED: Final = 2
"""After so many bad checkpoints in a row the job stops: something else is wrong."""

_Files = msgspec.json.Decoder(list[FileEntry])


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
    """

    reason: Reason
    position: Position
    running_states: dict[str, int]
    samples_per_step: int = 0
    data_parallel_size: int = 1
    rank_state: Callable[[], dict[str, Any]] | None = None


def write_checkpoint(runtime: Runtime, engine: Engine, snapshot: Snapshot) -> Path:
    """Save, and return once the checkpoint is sealed and durable. Collective.

    Raises:
        SaveFailed: on every rank, with the reason of the rank that failed first. The job
            directory is as it was before.
    """
    peers, began = runtime.peers, time.monotonic()
    before = runtime.slot.phase(Phase.SAVING)
    try:
        attempt = _begin(runtime, snapshot.position.step)
        try:
            path = _write(runtime, engine, snapshot, attempt)
        except SaveFailed:
            if peers.is_leader:
                attempt.drop()
            raise
    finally:
        runtime.slot.phase(before)
    runtime.slot.saved(snapshot.position.step)
    if peers.is_leader:
        seconds = time.monotonic() - began
        runtime.journal.write(
            "saved",
            path=str(path),
            step=snapshot.position.step,
            reason=snapshot.reason,
            seconds=seconds,
            stall_seconds=seconds,
        )
    return path


def _begin(runtime: Runtime, step: int) -> Attempt:
    made = runtime.peers.leader_does("begin", lambda: Attempt.begin(runtime.job, step))
    identity = made.identity if made else ""
    identity = runtime.peers.tell("attempt", identity.encode()).decode()
    return made or Attempt(runtime.job, identity, step)


def _write(runtime: Runtime, engine: Engine, snapshot: Snapshot, attempt: Attempt) -> Path:
    peers = runtime.peers
    header = _header(runtime, engine.info, snapshot, attempt)

    def state() -> bytes:
        engine.save(attempt.path)
        _write_rank_state(attempt.path, peers.rank, snapshot)
        if peers.is_leader:
            content = msgspec.json.encode(snapshot.running_states)
            write_atomic(attempt.path / "running_states.json", content)
        return b""

    def part() -> bytes:
        paths = _own_files(attempt.path, peers.rank)
        entries = attempt.write_part(
            peers.rank, peers.world_size, paths, header if peers.is_leader else None
        )
        return msgspec.json.encode(entries)

    peers.collect("state", state, watched=True)
    parts = peers.collect("part", part)
    files = [entry for data in parts for entry in _Files.decode(data)]
    peers.leader_does("seal", lambda: attempt.seal(header, files))
    return runtime.job.checkpoint(header.epoch, header.step)


def _own_files(directory: Path, rank: int) -> list[str]:
    """The files of a rank's part: its own state; and, for the leader, the engine's."""
    mine = f"ranks/{rank:05d}."
    return [
        path
        for path in files_below(directory)
        if path.startswith(mine) or (rank == 0 and not path.startswith(("ranks/", "parts/")))
    ]


def _write_rank_state(directory: Path, rank: int, snapshot: Snapshot) -> None:
    if snapshot.rank_state is not None:
        write_state(directory / "ranks", f"{rank:05d}", snapshot.rank_state())


def _header(
    runtime: Runtime, engine: EngineInfo, snapshot: Snapshot, attempt: Attempt
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
    )


# -- load -------------------------------------------------------------------------------------


def load_newest(runtime: Runtime, engine: Engine) -> tuple[Path, Manifest] | None:
    """Load the newest checkpoint that every rank finds whole. Collective.

    The leader chooses; the ranks share out the hashing and vote; nothing is unpickled before a
    unanimous yes. A checkpoint that is not what its manifest says is set aside.

    Returns:
        The checkpoint and its seal, or None if there is none at all.

    Raises:
        NoValidCheckpoint: there are checkpoints, and none can be used; or two in a row were bad.
        UnsupportedFormat: the newest was written by a newer version.
        SaveFailed: a rank could not read; the checkpoint is left alone.
    """
    set_aside_count = 0
    while True:
        path = _choose(runtime, set_aside_count)
        if path is None:
            return None
        reason = _verify_together(runtime, path)
        if not reason:
            return path, load_checked(runtime, engine, path)
        _reject(runtime, path, reason)
        set_aside_count += 1


def load_given(runtime: Runtime, engine: Engine, path: Path) -> Manifest:
    """Verify and load one checkpoint that the caller chose. Collective.

    Raises:
        CheckpointRejected: it is not whole; it is left where it is.
    """
    reason = _verify_together(runtime, path)
    if reason:
        raise CheckpointRejected(f"{path}: {reason}")
    return load_checked(runtime, engine, path)


def load_checked(runtime: Runtime, engine: Engine, path: Path) -> Manifest:
    """Load a checkpoint that was just verified. Collective."""
    manifest = read_manifest(path)
    if manifest.engine.name != engine.info.name:
        raise CheckpointError(
            f"{path.name} was written by the {manifest.engine.name} engine, but the script uses "
            f"{engine.info.name}: start a new --dir, or use the same kind of script"
        )
    try:
        engine.load(path)
    except ElasticCkptError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[:1]
        raise CheckpointError(
            f"the script's model or optimizer does not fit {path.name}: {''.join(first)}"
        ) from error
    return manifest


def read_rank_state(path: Path, manifest: Manifest, rank: int) -> dict[str, Any] | None:
    """What a rank saved for itself; a rank that did not exist then reads another one's."""
    name = f"{rank % manifest.world_size:05d}"
    if not (path / "ranks" / f"{name}.json").exists():
        return None
    state: dict[str, Any] = read_state(path / "ranks", name)
    return state


def _choose(runtime: Runtime, already_set_aside: int) -> Path | None:
    peers = runtime.peers

    def choose() -> Path | None:
        bad = already_set_aside
        unsealed: list[str] = []
        for path, why in candidates(runtime.job):
            if bad >= MAX_QUARANTINED:
                raise NoValidCheckpoint(
                    f"{bad} checkpoints in a row were bad and set aside in "
                    f"{runtime.job.quarantine}: see elastic-ckpt list, mend the storage, and "
                    "run again to go on from an older one"
                )
            if why is None:
                return path
            if isinstance(why, NotSealed):
                unsealed.append(path.name)  # not ours: left alone, never chosen
                continue
            _quarantine(runtime, path, str(why))
            bad += 1
        if bad or unsealed:
            raise NoValidCheckpoint(
                f"checkpoints exist in {runtime.job.root} but none is valid"
                + (f" ({', '.join(unsealed[:3])} not sealed)" if unsealed else "")
                + ": see elastic-ckpt list, or choose another directory to start anew"
            )
        return None

    chosen = peers.leader_does("choose", choose)
    told = peers.tell("chosen", str(chosen or "").encode()).decode()
    return Path(told) if told else None


def _verify_together(runtime: Runtime, path: Path) -> str:
    """Each rank hashes its share; empty if all agree that the checkpoint is whole."""
    peers = runtime.peers

    def share() -> bytes:
        try:
            files = read_manifest(path).files
            verify_files(path, files[peers.rank :: peers.world_size])
        except (CheckpointRejected, FileNotFoundError) as error:
            return str(error).encode()
        return b""

    votes = peers.collect("verify", share)
    reason = next((vote.decode() for vote in votes if vote), "")
    return peers.tell("vote", reason.encode()).decode()


def _reject(runtime: Runtime, path: Path, reason: str) -> None:
    runtime.peers.leader_does("reject", lambda: _quarantine(runtime, path, reason))


def _quarantine(runtime: Runtime, path: Path, reason: str) -> None:
    target = set_aside(runtime.job, path, reason)
    runtime.journal.write("quarantined", path=str(path), to=str(target), reason=reason)
