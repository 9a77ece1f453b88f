"""A checkpoint that may be loaded: locked, verified by all ranks, and checked again afterwards."""

from __future__ import annotations

import errno
import logging
import os
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from elastic_ckpt.checkpoint.manifest import Manifest, MemorySeal
from elastic_ckpt.checkpoint.memory.tier import Generation, check_covers
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
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.journal.events import CheckpointVerified
from elastic_ckpt.protocol.slot import Source
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.util.progress import in_lines, unwatched
from elastic_ckpt.util.text import printable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was loaded.

    Attributes:
        path: the directory that was read.
        seal: its manifest, or its seal in the memory tier.
        source: its tier.
    """

    path: Path
    seal: Manifest | MemorySeal
    source: Source


class LoadCandidate(ABC):
    """A checkpoint from its choice to the end of its load. No process deletes it meanwhile.

    A context manager. Every method but ``look`` is collective.
    """

    in_memory: ClassVar[bool]

    def __init__(self, runtime: Runtime, path: Path) -> None:
        self._runtime = runtime
        self._path = path
        self._held = ExitStack()

    def __enter__(self) -> LoadCandidate:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def verify(self) -> str:
        """Verify it, each rank a share of its files.

        Returns:
            Why the checkpoint cannot be loaded; empty if all ranks accept it.
        """
        started = time.monotonic()
        log.info("verifying %s", self._path)
        peers = self._runtime.peers
        votes = peers.collect("verify", self._vote, doing="verify")
        reason = next((vote.decode() for vote in votes if vote), "")
        reason = peers.tell("vote", reason.encode()).decode()
        seconds = time.monotonic() - started
        log.info("%s, after %.3f s", f"rejected: {reason}" if reason else "verified", seconds)
        if peers.is_leader:
            self._runtime.journal.write(
                CheckpointVerified(
                    path=str(self._path),
                    intact=not reason,
                    why=reason,
                    how="sizes, in memory" if self.in_memory else "every byte",
                    seconds=seconds,
                )
            )
        return reason

    def _vote(self) -> bytes:
        try:
            self.look()
        except (CheckpointRejected, FileNotFoundError) as error:
            return printable(str(error)).encode()
        return b""

    @abstractmethod
    def look(self) -> None:
        """Lock it and verify this rank's share.

        Raises:
            CheckpointRejected, FileNotFoundError: this rank does not accept it.
        """

    @property
    @abstractmethod
    def verified(self) -> Loaded:
        """The checkpoint to load, once :meth:`verify` has accepted it. Not collective."""

    @abstractmethod
    def confirm(self) -> None:
        """Check, after it was loaded, that its files did not change meanwhile.

        Raises:
            CheckpointRejected: on every rank, if they did.
        """


class MemoryCandidate(LoadCandidate):
    """A generation of the memory tier. Its seal has only sizes: memory loses no single bytes."""

    in_memory = True
    _seal: MemorySeal | None = None

    def look(self) -> None:
        """See :class:`LoadCandidate`."""
        generation = Generation(self._path)
        self._held.callback(generation.lock().release)
        self._seal = generation.seal()
        if self._seal is None:
            raise CheckpointRejected("it is not sealed, or a file is missing")
        check_covers(self._seal, self._runtime.peers.world_size)

    @property
    def verified(self) -> Loaded:
        """See :class:`LoadCandidate`."""
        if self._seal is None:
            raise CheckpointRejected("it was not verified")  # a bug
        return Loaded(Generation(self._path).path, self._seal, Source.MEMORY)

    def confirm(self) -> None:
        """See :class:`LoadCandidate`; only workers write to memory, and they are loading."""


class DiskCandidate(LoadCandidate):
    """A checkpoint on disk, of which every byte is hashed before it is loaded."""

    in_memory = False
    _unchanged: Unchanged
    _manifest: Manifest

    def look(self) -> None:
        """See :class:`LoadCandidate`."""
        peers, path = self._runtime.peers, self._path
        read_manifest(path)  # reports a bad manifest, where the lock only finds it missing
        self._held.callback(_lock(path).release)
        # On every rank, as a rank hashes only listed files: this finds links and unlisted files.
        self._manifest = verify_quick(path)
        mine = share_out(self._manifest.files, peers.rank, peers.world_size)
        self._unchanged = Unchanged(path, mine)
        watch = in_lines(self._runtime.say) if peers.is_leader else unwatched
        total = sum(entry.bytes for entry in mine)
        verify_files(path, mine, watch(f"verifying {path.name}", total))

    @property
    def verified(self) -> Loaded:
        """See :class:`LoadCandidate`."""
        return Loaded(self._path, self._manifest, Source.DISK)

    def confirm(self) -> None:
        """See :class:`LoadCandidate`; from then on the checkpoint counts as verified."""
        peers = self._runtime.peers

        def check() -> bytes:
            try:
                self._unchanged.check()
            except CheckpointRejected as error:
                return printable(str(error)).encode()
            return b""

        votes = peers.collect("unchanged", check, doing="load")
        changed = peers.tell("changed", next((vote for vote in votes if vote), b"")).decode()
        if changed:
            raise CheckpointRejected(f"{self._path.name}: {changed}; rerun the same command")
        if peers.is_leader:
            mark_verified(self._runtime.job, self._path, self._manifest)


def open_candidate(runtime: Runtime, path: Path) -> LoadCandidate:
    """Return the checkpoint at a path, on disk or in the memory tier. Not collective."""
    held = runtime.memory is not None and path.parent == runtime.memory.tier.root
    return MemoryCandidate(runtime, path) if held else DiskCandidate(runtime, path)


def _lock(path: Path) -> ReadLock:
    """Lock a checkpoint against deletion.

    Raises:
        BeingRemoved: it is being deleted.
        OSError: another process keeps it locked, which any reader can do. The checkpoint may be
            good, so it must not be set aside.
    """
    try:
        return ReadLock(path)
    except BeingRemoved:
        if not os.path.lexists(path / MANIFEST_NAME):
            raise
    why = "another process keeps it locked"
    raise OSError(errno.EBUSY, why, str(path / MANIFEST_NAME))
