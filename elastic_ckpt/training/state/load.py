"""One load, from the choice of a checkpoint to the state in place.

Collective: the leader chooses, the ranks share out the hashing and vote, and nothing is unpickled
before a unanimous yes.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from elastic_ckpt.checkpoint.catalog import candidates
from elastic_ckpt.checkpoint.manifest import EngineInfo, Manifest, MemorySeal
from elastic_ckpt.checkpoint.memory.tier import Generation, Sealed, check_covers
from elastic_ckpt.checkpoint.quarantine import set_aside
from elastic_ckpt.checkpoint.read_lock import BeingRemoved, ReadLock
from elastic_ckpt.checkpoint.verify import (
    MANIFEST_NAME,
    Unchanged,
    mark_verified,
    read_manifest,
    share_out,
    verify_files,
    verify_quick,
)
from elastic_ckpt.errors import (
    CannotReshard,
    CheckpointError,
    CheckpointRejected,
    ElasticCkptError,
    NotSealed,
    NoUsableCheckpoint,
)
from elastic_ckpt.jobdir.paths import checkpoint_key
from elastic_ckpt.protocol.slot import Source
from elastic_ckpt.training.engines import Engine
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.tensors.state_codec import read_state
from elastic_ckpt.util.progress import in_lines, unwatched
from elastic_ckpt.util.text import printable

log = logging.getLogger(__name__)

MAX_QUARANTINED: Final = 2
"""After so many bad checkpoints in a row the job stops: something else is wrong."""


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        place: the directory that was read.
        seal: what it says of itself.
        source: the tier that it lies on.
    """

    place: Path
    seal: Manifest | MemorySeal
    source: Source


def load_newest(runtime: Runtime, engine: Engine) -> Loaded | None:
    """Load the newest checkpoint that every rank finds whole. Collective.

    From memory if it is there. On disk, a checkpoint that is not what its manifest says is set
    aside.

    Returns:
        The checkpoint, or None if there is none at all.

    Raises:
        NoUsableCheckpoint: there are checkpoints, and none can be used; or two in a row were bad.
        UnsupportedFormat: the newest was written by a newer version.
        StorageFailed: a rank could not read; the checkpoint is left alone.
        CheckpointError: the state does not fit what a rank built. CannotReshard, if another
            plugin or number of ranks wrote it.
    """
    set_aside_count = 0
    refused: set[Path] = set()
    while True:
        path = _choose(runtime, set_aside_count, refused)
        if path is None:
            log.info("nothing to load: a new beginning")
            return None
        with _open(runtime, path) as opened:
            reason = _verified(runtime, opened, path)
            if not reason:
                return opened.load(engine)
        set_aside_count += _reject(runtime, path, reason)
        refused.add(path)


def load_given(runtime: Runtime, engine: Engine, path: Path) -> Loaded:
    """Verify and load one checkpoint that the caller chose. Collective.

    One that is still on its way to the disk is read from memory.

    Raises:
        CheckpointRejected: it is not whole; it is left where it is.
    """
    where = _where(runtime, path)
    with _open(runtime, where) as opened:
        reason = _verified(runtime, opened, where)
        if reason:
            raise CheckpointRejected(f"{path}: {reason}")
        return opened.load(engine)


def read_rank_state(loaded: Loaded, rank: int) -> dict[str, Any] | None:
    """What a rank saved for itself; a rank that did not exist then reads another one's."""
    path, seal = loaded.place, loaded.seal
    name = f"{rank % seal.world_size:05d}"
    if not any(entry.path == f"ranks/{name}.json" for entry in seal.files):
        return None
    state = read_state(path / "ranks", name)
    if not (
        isinstance(state, dict)
        and isinstance(state.get("rng"), dict)
        and isinstance(state.get("extra"), dict)
    ):
        raise CheckpointRejected(f"ranks/{name} in {seal.checkpoint_name} holds no rank's state")
    return state


class _Opened(ABC):
    """A checkpoint between the choice and the end of its load: nobody deletes it meanwhile."""

    def __init__(self, runtime: Runtime, path: Path) -> None:
        self._runtime = runtime
        self._path = path
        self._held = ExitStack()

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def verify(self) -> str:
        """Each rank looks at its share; empty if all agree that the checkpoint is whole."""
        peers = self._runtime.peers
        votes = peers.collect("verify", self._vote, doing="verify")
        reason = next((vote.decode() for vote in votes if vote), "")
        return peers.tell("vote", reason.encode()).decode()

    def _vote(self) -> bytes:
        try:
            self._look()
        except (CheckpointRejected, FileNotFoundError) as error:
            return printable(str(error)).encode()
        return b""

    @abstractmethod
    def _look(self) -> None:
        """Raise if this rank does not find it whole."""

    @abstractmethod
    def load(self, engine: Engine) -> Loaded:
        """Load what was just verified. Collective."""


class _InMemory(_Opened):
    """A generation: sizes are all that its seal knows, and no machine's loss lies behind it."""

    _seal: MemorySeal | None = None

    def _look(self) -> None:
        generation = Generation(self._path)
        self._held.callback(generation.lock().release)
        self._seal = generation.seal()
        if self._seal is None:
            raise CheckpointRejected("it is not whole")
        check_covers(self._seal, self._runtime.peers.world_size)

    def load(self, engine: Engine) -> Loaded:
        """Load it. Collective."""
        if self._seal is None:
            raise CheckpointRejected("it was not verified")  # a mistake of ours
        loaded = Loaded(Generation(self._path).path, self._seal, Source.MEMORY)
        _load(self._runtime, engine, loaded)
        return loaded


class _OnDisk(_Opened):
    """A checkpoint whose every byte is hashed before it is loaded."""

    _unchanged: Unchanged | None = None
    _manifest: Manifest | None = None

    def _look(self) -> None:
        peers, path = self._runtime.peers, self._path
        read_manifest(path)  # says what is wrong with the seal, where the lock finds it gone
        self._held.callback(_lock(path).release)
        # On every rank: links and files that are not listed are seen here alone.
        self._manifest = verify_quick(path)
        mine = share_out(self._manifest.files, peers.rank, peers.world_size)
        self._unchanged = Unchanged(path, mine)
        watch = in_lines(self._runtime.say) if peers.is_leader else unwatched
        total = sum(entry.bytes for entry in mine)
        verify_files(path, mine, watch(f"verifying {path.name}", total))

    def load(self, engine: Engine) -> Loaded:
        """Load what was just verified, and see that it stayed so. Collective."""
        manifest, unchanged = self._manifest, self._unchanged
        if manifest is None or unchanged is None:
            raise CheckpointRejected("it was not verified")  # a mistake of ours
        loaded = Loaded(self._path, manifest, Source.DISK)
        _load(self._runtime, engine, loaded)
        peers = self._runtime.peers

        def look_again() -> bytes:
            try:
                unchanged.check()
            except CheckpointRejected as error:
                return printable(str(error)).encode()
            return b""

        votes = peers.collect("unchanged", look_again, doing="load")
        told = peers.tell("changed", next((vote for vote in votes if vote), b"")).decode()
        if told:
            raise CheckpointRejected(f"{self._path.name}: {told}; run again")
        if peers.is_leader:
            mark_verified(self._runtime.job, self._path, manifest)
        return loaded


def _verified(runtime: Runtime, opened: _Opened, path: Path) -> str:
    """Why a checkpoint cannot be loaded; empty if every rank finds it whole. Collective."""
    began = time.monotonic()
    log.info("verifying %s", path)
    reason = opened.verify()
    said = f"failed verification: {reason}" if reason else "passed verification"
    log.info("%s, after %.3f s", said, time.monotonic() - began)
    if runtime.peers.is_leader:
        runtime.journal.write(
            "verified",
            path=str(path),
            intact=not reason,
            why=reason,
            how="sizes, in memory" if isinstance(opened, _InMemory) else "every byte",
            seconds=time.monotonic() - began,
        )
    return reason


def _open(runtime: Runtime, path: Path) -> _Opened:
    held = runtime.memory is not None and path.parent == runtime.memory.tier.root
    return _InMemory(runtime, path) if held else _OnDisk(runtime, path)


def _lock(path: Path) -> ReadLock:
    """Keep it from being deleted.

    Raises:
        BeingRemoved: it is gone.
        OSError: somebody keeps it locked, as everybody can who may read it. That says nothing
            about the checkpoint, which must not be set aside for it.
    """
    try:
        return ReadLock(path)
    except BeingRemoved:
        if not os.path.lexists(path / MANIFEST_NAME):
            raise
    why = "another process keeps it locked"
    raise OSError(errno.EBUSY, why, str(path / MANIFEST_NAME))


def _load(runtime: Runtime, engine: Engine, loaded: Loaded) -> None:
    """Put the state in place. Collective: what one rank raises, all of them do."""
    peers, began = runtime.peers, time.monotonic()

    def load() -> bytes:
        return _load_alone(engine, loaded, peers.world_size).encode()

    lost = next(
        (note.decode() for note in peers.collect("load", load, doing="load", watched=True) if note),
        "",
    )
    if lost and peers.is_leader:
        runtime.say(f"{loaded.seal.checkpoint_name} is not restored to the bit: {lost}")
        runtime.journal.write("inexact", path=str(loaded.place), reason=lost)
    seconds, size = time.monotonic() - began, loaded.seal.total_bytes
    name = loaded.seal.checkpoint_name
    log.info("loaded %s from %s: %d bytes, %.3f s", name, loaded.place, size, seconds)
    if peers.is_leader:
        _tell(runtime, loaded, seconds)


def _tell(runtime: Runtime, loaded: Loaded, seconds: float) -> None:
    """Journal what is gone on from, and on how many other ranks. Leader only."""
    seal, ranks = loaded.seal, runtime.peers.world_size
    runtime.journal.write(
        "loaded",
        path=str(runtime.job.checkpoint(seal.epoch, seal.step)),
        step=seal.step,
        epoch=seal.epoch,
        sample_start_index=seal.sample_start_index,
        tier=loaded.source.name.lower(),
        bytes=seal.total_bytes,
        seconds=seconds,
    )
    if seal.world_size != ranks:
        runtime.journal.write("resize", before=seal.world_size, now=ranks, step=seal.step)


def _load_alone(engine: Engine, loaded: Loaded, world_size: int) -> str:
    name, written_by = loaded.seal.checkpoint_name, loaded.seal.engine.name
    if written_by != engine.info.name:
        raise CheckpointError(
            f"{name} was written by the {printable(written_by, 80)} engine, but "
            f"the script uses {engine.info.name}: start a new --dir, or use the same kind of script"
        )
    try:
        return engine.load(loaded.place)
    except (ElasticCkptError, OSError):  # the latter is the storage's
        raise
    except Exception as error:  # torch and ColossalAI raise and assert all kinds of things
        first = "".join(str(error).strip().splitlines()[:1]) or type(error).__name__
        before = _layout(loaded.seal.engine, loaded.seal.world_size)
        now = _layout(engine.info, world_size)
        if before != now:
            raise CannotReshard(
                f"{name} was written by {before} and cannot be loaded by {now}: "
                f"{printable(first)}; run as before, or start a new --dir"
            ) from error
        raise CheckpointError(
            f"the script's model or optimizer does not fit {name}: {printable(first)}; take the "
            "script of then, or start a new --dir"
        ) from error


def _layout(engine: EngineInfo, world_size: int) -> str:
    """What decides how a state is cut up: ``HybridParallelPlugin on 4 ranks``."""
    ranks = "rank" if world_size == 1 else "ranks"
    return f"{printable(engine.plugin or engine.name, 80)} on {world_size} {ranks}"


def _where(runtime: Runtime, path: Path) -> Path:
    """A given checkpoint's place: on disk if it stands there, else its generation's."""

    def look() -> Path:
        if not os.path.lexists(path) and runtime.memory is not None:
            for held in runtime.memory.tier.sealed():
                if runtime.job.checkpoint(*held.key) == path:
                    return held.generation.slot
        return path

    place = runtime.peers.leader_does("where", look)
    return Path(runtime.peers.tell("place", str(place or "").encode()).decode())


def _newest_in_memory(runtime: Runtime, refused: set[Path]) -> Sealed | None:
    """The newest generation that these ranks can load."""
    if runtime.memory is None:
        return None
    for held in runtime.memory.tier.sealed():
        if held.generation.slot not in refused:
            with suppress(CheckpointRejected):
                check_covers(held.seal, runtime.peers.world_size)
                return held
    return None


def _choose(runtime: Runtime, already_set_aside: int, refused: set[Path]) -> Path | None:
    peers = runtime.peers

    def choose() -> Path | None:
        bad = already_set_aside
        unsealed: list[str] = []
        held = _newest_in_memory(runtime, refused)
        for path, why in candidates(runtime.job):
            if held is not None and held.key >= (checkpoint_key(path.name) or (0, 0)):
                return held.generation.slot
            if bad >= MAX_QUARANTINED:
                raise NoUsableCheckpoint(
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
        if held is not None:
            return held.generation.slot
        if bad or unsealed:
            raise NoUsableCheckpoint(
                f"checkpoints exist in {runtime.job.root} but none is intact"
                + (f" ({', '.join(unsealed[:3])} not sealed)" if unsealed else "")
                + ": see elastic-ckpt list, or choose another directory to start anew"
            )
        return None

    chosen = peers.leader_does("choose", choose)
    told = peers.tell("chosen", str(chosen or "").encode()).decode()
    return Path(told) if told else None


def _reject(runtime: Runtime, path: Path, reason: str) -> int:
    """How many were set aside, on the leader: none if somebody deleted it meanwhile."""

    def reject() -> int:
        if isinstance(_open(runtime, path), _InMemory):
            runtime.journal.write("memory_refused", path=str(path), reason=reason)
            return 0
        if not os.path.lexists(path):
            return 0
        _quarantine(runtime, path, reason)
        return 1

    return runtime.peers.leader_does("reject", reject) or 0


def _quarantine(runtime: Runtime, path: Path, reason: str) -> None:
    target = set_aside(runtime.job, path, reason)
    runtime.journal.write("quarantined", path=str(path), to=str(target), reason=reason)
