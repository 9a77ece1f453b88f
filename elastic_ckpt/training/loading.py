"""One load, from the choice of a checkpoint to the state in place.

Collective: the leader chooses, the ranks share out the hashing and vote, and nothing is unpickled
before a unanimous yes.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from elastic_ckpt.core.manifest import Manifest
from elastic_ckpt.core.progress import in_lines, unwatched
from elastic_ckpt.core.text import printable
from elastic_ckpt.errors import (
    CheckpointError,
    CheckpointRejected,
    ElasticCkptError,
    NotSealed,
    NoValidCheckpoint,
)
from elastic_ckpt.store.catalog import candidates
from elastic_ckpt.store.quarantine import set_aside
from elastic_ckpt.store.reading import BeingRemoved, ReadLock
from elastic_ckpt.store.verified import mark_verified
from elastic_ckpt.store.verify import (
    MANIFEST_NAME,
    Unchanged,
    read_manifest,
    share_out,
    verify_files,
    verify_quick,
)
from elastic_ckpt.training.engines import Engine
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.state_codec import read_state

MAX_QUARANTINED: Final = 2
"""After so many bad checkpoints in a row the job stops: something else is wrong."""


def load_newest(runtime: Runtime, engine: Engine) -> tuple[Path, Manifest] | None:
    """Load the newest checkpoint that every rank finds whole. Collective.

    A checkpoint that is not what its manifest says is set aside.

    Returns:
        The checkpoint and its seal, or None if there is none at all.

    Raises:
        NoValidCheckpoint: there are checkpoints, and none can be used; or two in a row were bad.
        UnsupportedFormat: the newest was written by a newer version.
        StorageFailed: a rank could not read; the checkpoint is left alone.
    """
    set_aside_count = 0
    while True:
        path = _choose(runtime, set_aside_count)
        if path is None:
            return None
        with _Opened(runtime, path) as opened:
            reason = opened.verify()
            if not reason:
                return path, opened.load(engine)
        set_aside_count += _reject(runtime, path, reason)


def load_given(runtime: Runtime, engine: Engine, path: Path) -> Manifest:
    """Verify and load one checkpoint that the caller chose. Collective.

    Raises:
        CheckpointRejected: it is not whole; it is left where it is.
    """
    with _Opened(runtime, path) as opened:
        reason = opened.verify()
        if reason:
            raise CheckpointRejected(f"{path}: {reason}")
        return opened.load(engine)


def read_rank_state(path: Path, manifest: Manifest, rank: int) -> dict[str, Any] | None:
    """What a rank saved for itself; a rank that did not exist then reads another one's."""
    name = f"{rank % manifest.world_size:05d}"
    if not any(entry.path == f"ranks/{name}.json" for entry in manifest.files):
        return None
    state = read_state(path / "ranks", name)
    if not (
        isinstance(state, dict)
        and isinstance(state.get("rng"), dict)
        and isinstance(state.get("extra"), dict)
    ):
        raise CheckpointRejected(f"ranks/{name} in {path.name} holds no rank's state")
    return state


class _Opened:
    """A checkpoint between the choice and the end of its load: nobody deletes it meanwhile."""

    def __init__(self, runtime: Runtime, path: Path) -> None:
        self._runtime = runtime
        self._path = path
        self._held = ExitStack()
        self._unchanged: Unchanged | None = None
        self._manifest: Manifest | None = None

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def verify(self) -> str:
        """Each rank hashes its share; empty if all agree that the checkpoint is whole."""
        peers = self._runtime.peers
        votes = peers.collect("verify", self._vote)
        reason = next((vote.decode() for vote in votes if vote), "")
        return peers.tell("vote", reason.encode()).decode()

    def _vote(self) -> bytes:
        peers, path = self._runtime.peers, self._path
        try:
            read_manifest(path)  # says what is wrong with the seal, where the lock finds it gone
            self._held.callback(_lock(path).release)
            # On every rank: links and files that are not listed are seen here alone.
            self._manifest = verify_quick(path)
            mine = share_out(self._manifest.files, peers.rank, peers.world_size)
            self._unchanged = Unchanged(path, mine)
            watch = in_lines(self._runtime.say) if peers.is_leader else unwatched
            total = sum(entry.bytes for entry in mine)
            verify_files(path, mine, watch(f"verifying {path.name}", total))
        except (CheckpointRejected, FileNotFoundError) as error:
            return printable(str(error)).encode()
        return b""

    def load(self, engine: Engine) -> Manifest:
        """Load what was just verified, and see that it stayed so. Collective."""
        manifest, unchanged = self._manifest, self._unchanged
        if manifest is None or unchanged is None:
            raise CheckpointRejected("it was not verified")  # a mistake of ours
        _load(engine, self._path, manifest)
        peers = self._runtime.peers

        def look_again() -> bytes:
            try:
                unchanged.check()
            except CheckpointRejected as error:
                return printable(str(error)).encode()
            return b""

        changed = [vote.decode() for vote in peers.collect("unchanged", look_again) if vote]
        told = peers.tell("changed", "".join(changed[:1]).encode()).decode()
        if told:
            raise CheckpointRejected(f"{self._path.name}: {told}; run again")
        if peers.is_leader:
            mark_verified(self._runtime.job, self._path, manifest)
        return manifest


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


def _load(engine: Engine, path: Path, manifest: Manifest) -> None:
    if manifest.engine.name != engine.info.name:
        raise CheckpointError(
            f"{path.name} was written by the {printable(manifest.engine.name, 80)} engine, but "
            f"the script uses {engine.info.name}: start a new --dir, or use the same kind of script"
        )
    try:
        engine.load(path)
    except ElasticCkptError:
        raise
    except OSError:
        raise  # the storage's
    except Exception as error:  # torch and ColossalAI raise and assert all kinds of things
        first = "".join(str(error).strip().splitlines()[:1]) or type(error).__name__
        raise CheckpointError(
            f"the script's model or optimizer does not fit {path.name}: {printable(first)}"
        ) from error


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


def _reject(runtime: Runtime, path: Path, reason: str) -> int:
    """How many were set aside, on the leader: none if somebody deleted it meanwhile."""

    def reject() -> int:
        if not os.path.lexists(path):
            return 0
        _quarantine(runtime, path, reason)
        return 1

    return runtime.peers.leader_does("reject", reject) or 0


def _quarantine(runtime: Runtime, path: Path, reason: str) -> None:
    target = set_aside(runtime.job, path, reason)
    runtime.journal.write("quarantined", path=str(path), to=str(target), reason=reason)
