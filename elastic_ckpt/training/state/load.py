"""One load, from a checkpoint's choice to the state in place.

Collective: the leader chooses, the ranks share the hashing and vote, and nothing is loaded before
a unanimous yes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from elastic_ckpt.checkpoint.manifest import EngineInfo
from elastic_ckpt.errors import (
    CannotReshard,
    CheckpointError,
    CheckpointRejected,
    ElasticCkptError,
)
from elastic_ckpt.journal.events import CheckpointLoaded, RestoredInexactly, WorldResized
from elastic_ckpt.training.engines import Engine
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.state.candidate import LoadCandidate, Loaded, Readable
from elastic_ckpt.training.state.choice import CheckpointChoice, given
from elastic_ckpt.util.text import printable

log = logging.getLogger(__name__)

T = TypeVar("T")

Resume = Callable[[Readable], str]
"""Restores a rank's own state after the engine's load; returns what it could not restore. All that
is read of the checkpoint is read here."""


def _nothing(_: Readable) -> str:
    return ""


def load_newest(runtime: Runtime, engine: Engine, resume: Resume = _nothing) -> Loaded | None:
    """Load the newest checkpoint that every rank verifies, from memory if it is there. Collective.

    A checkpoint on disk that fails verification is set aside, and the next older one is tried.

    Returns:
        The checkpoint, or None if the job has none.

    Raises:
        NoUsableCheckpoint: there are checkpoints, but none is usable, or two in a row were bad.
        UnsupportedFormat: a newer version wrote the newest one.
        StorageFailed: a rank could not read; the checkpoint is left alone.
        CheckpointError: the state does not fit the script's model or optimizer. CannotReshard, if
            another plugin or number of ranks wrote it.
    """
    candidate = runtime.candidate if runtime.has_looked else choose(runtime, engine)
    if candidate is None:
        return None
    with candidate:
        if runtime.has_looked and (reason := _bring(runtime, engine, candidate)):
            CheckpointChoice(runtime).reject(candidate.ref, reason)
            raise CheckpointRejected(
                f"{candidate.loaded.seal.checkpoint_name}: {reason}; it is set aside, and the "
                "script already knows where it resumes: rerun the same command"
            )
        return _load(runtime, engine, candidate, resume)


def choose(runtime: Runtime, engine: Engine | None = None) -> LoadCandidate | None:
    """Return the checkpoint that :func:`load_newest` loads, verified and locked. Collective.

    Without an engine, a load still has to bring and verify what the engine reads of large files
    that are in a bucket.
    """
    choice = CheckpointChoice(runtime)
    while True:
        candidate = choice.newest()
        if candidate is None:
            log.info("no checkpoint to load: fresh start")
            return None
        try:
            reason = candidate.verify()
            if engine is not None and not reason:
                reason = _bring(runtime, engine, candidate)
        except BaseException:
            candidate.close()
            raise
        if not reason:
            return candidate
        candidate.close()
        choice.reject(candidate.ref, reason)


def load_given(runtime: Runtime, engine: Engine, path: Path, resume: Resume = _nothing) -> Loaded:
    """Verify and load one checkpoint that the caller chose, from memory if it is not on disk yet.
    Collective. CheckpointRejected if it failed verification; it is not moved. The first save after
    it supersedes the job's newer ones; until then nothing moves, as a script may only look."""
    with given(runtime, path) as candidate:
        reason = candidate.verify() or _bring(runtime, engine, candidate)
        if reason:
            raise CheckpointRejected(f"{path}: {reason}")
        loaded = _load(runtime, engine, candidate, resume)
    runtime.rewound_to = (loaded.seal.epoch, loaded.seal.step)
    return loaded


def load_on_rank(engine: Engine, loaded: Readable, world_size: int) -> str:
    """Load a verified checkpoint on this rank, and return what was not restored bit for bit.
    Raises as :func:`_ask`."""
    return _ask(engine, engine.load, loaded, world_size)


def _bring(runtime: Runtime, engine: Engine, candidate: LoadCandidate) -> str:
    """Bring what this engine reads; as :meth:`LoadCandidate.bring`."""
    ranks = runtime.peers.world_size
    return candidate.bring(lambda: _ask(engine, engine.ranges, candidate.loaded, ranks))


def _ask(engine: Engine, ask: Callable[[Path], T], loaded: Readable, world_size: int) -> T:
    """Return what a method of the engine returns for a checkpoint.

    Raises:
        CannotReshard: another plugin or number of ranks wrote the checkpoint.
        CheckpointError: another engine wrote it, or the script's state does not fit it.
    """
    name, written_by = loaded.seal.checkpoint_name, loaded.seal.engine.name
    if written_by != engine.info.name:
        raise CheckpointError(
            f"{name} was written by the {printable(written_by, 80)} engine, but the script uses "
            f"{engine.info.name}: use that engine, or start over with a new --dir"
        )
    try:
        return ask(loaded.path)
    except (ElasticCkptError, OSError):  # the latter is the storage's
        raise
    except Exception as error:  # torch and ColossalAI raise and assert all kinds of things
        first = "".join(str(error).strip().splitlines()[:1]) or type(error).__name__
        before = _layout(loaded.seal.engine, loaded.seal.world_size)
        now = _layout(engine.info, world_size)
        if before != now:
            raise CannotReshard(
                f"{name} was written by {before} and cannot be loaded by {now}: "
                f"{printable(first)}; run with that layout, or start over with a new --dir"
            ) from error
        raise CheckpointError(
            f"the script's model or optimizer does not fit {name}: {printable(first)}; use the "
            "script that saved it, or start over with a new --dir"
        ) from error


def _load(runtime: Runtime, engine: Engine, candidate: LoadCandidate, resume: Resume) -> Loaded:
    """Put the verified state in place. Collective: an error on one rank is raised on all."""
    peers, started, loaded = runtime.peers, time.monotonic(), candidate.loaded

    def load() -> bytes:
        candidate.settle()
        lost = load_on_rank(engine, loaded, peers.world_size), resume(loaded)
        return "; ".join(filter(None, lost)).encode()

    notes = peers.collect("load", load, doing="load", watched=True)
    inexact = next((note.decode() for note in notes if note), "")
    name, path = loaded.seal.checkpoint_name, str(loaded.path)
    if inexact and peers.is_leader:
        runtime.say(f"{name} is not restored bit for bit: {inexact}")
        runtime.journal.write(RestoredInexactly(path=path, reason=inexact))
    seconds, size = time.monotonic() - started, loaded.seal.total_bytes
    log.info("loaded %s from %s: %d bytes, %.3f s", name, path, size, seconds)
    if peers.is_leader:
        _write_journal(runtime, loaded, seconds)
    candidate.confirm()
    runtime.parent = loaded.seal.attempt
    return Loaded(loaded.seal, loaded.source)


def _write_journal(runtime: Runtime, loaded: Loaded, seconds: float) -> None:
    seal, ranks = loaded.seal, runtime.peers.world_size
    runtime.journal.write(
        CheckpointLoaded(
            path=str(runtime.job.checkpoint(seal.epoch, seal.step)),
            step=seal.step,
            epoch=seal.epoch,
            sample_start_index=seal.sample_start_index,
            tier=loaded.source.name.lower(),
            bytes=seal.total_bytes,
            seconds=seconds,
        )
    )
    if seal.world_size != ranks:
        runtime.journal.write(WorldResized(before=seal.world_size, now=ranks, step=seal.step))


def _layout(engine: EngineInfo, world_size: int) -> str:
    """Describe what determines how a state is sharded: ``HybridParallelPlugin on 4 ranks``."""
    ranks = "rank" if world_size == 1 else "ranks"
    return f"{printable(engine.plugin or engine.name, 80)} on {world_size} {ranks}"
