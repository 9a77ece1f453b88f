"""A checkpoint that may be loaded: locked, verified by all ranks, and checked again afterwards."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from elastic_ckpt.checkpoint.manifest import Manifest, MemorySeal
from elastic_ckpt.checkpoint.tier import Reading, Ref, Tier
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


class LoadCandidate:
    """A checkpoint from its choice to the end of its load. No process deletes it meanwhile.

    A context manager. Every method is collective.
    """

    def __init__(self, runtime: Runtime, tier: Tier, ref: Ref) -> None:
        self._runtime = runtime
        self._tier = tier
        self._reading: Reading | None = None
        self._held = ExitStack()
        self.ref = ref

    def __enter__(self) -> LoadCandidate:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def verify(self) -> str:
        """Verify it, each rank a share of its files.

        Returns:
            Why the checkpoint cannot be loaded; empty if all ranks accept it.
        """
        started, where = time.monotonic(), self._tier.where(self.ref)
        log.info("verifying %s", where)
        peers = self._runtime.peers
        votes = peers.collect("verify", self._vote, doing="verify")
        reason = next((vote.decode() for vote in votes if vote), "")
        reason = peers.tell("vote", reason.encode()).decode()
        seconds = time.monotonic() - started
        log.info("%s, after %.3f s", f"rejected: {reason}" if reason else "verified", seconds)
        if peers.is_leader:
            how = "every byte" if self._tier.every_byte else "sizes, in memory"
            self._runtime.journal.write(
                CheckpointVerified(
                    path=where, intact=not reason, why=reason, how=how, seconds=seconds
                )
            )
        return reason

    def _vote(self) -> bytes:
        peers = self._runtime.peers
        watch = in_lines(self._runtime.say) if peers.is_leader else unwatched
        try:
            reading = self._tier.open(self.ref)
            self._held.callback(reading.close)
            reading.verify(peers.rank, peers.world_size, watch)
        except CheckpointRejected as error:
            return printable(str(error)).encode()
        self._reading = reading
        return b""

    @property
    def _verified(self) -> Reading:
        assert self._reading is not None, "load only what verify() has accepted"
        return self._reading

    @property
    def loaded(self) -> Loaded:
        """The checkpoint to load, once :meth:`verify` has accepted it. Not collective."""
        reading = self._verified
        return Loaded(reading.path, reading.seal, Source[self.ref.tier.upper()])

    def confirm(self) -> None:
        """Check, after it was loaded, that its files did not change meanwhile.

        Raises:
            CheckpointRejected: on every rank, if they did.
        """
        peers, reading = self._runtime.peers, self._verified

        def check() -> bytes:
            try:
                reading.confirm()
            except CheckpointRejected as error:
                return printable(str(error)).encode()
            return b""

        votes = peers.collect("unchanged", check, doing="load")
        changed = peers.tell("changed", next((vote for vote in votes if vote), b"")).decode()
        if changed:
            name = reading.seal.checkpoint_name
            raise CheckpointRejected(f"{name}: {changed}; rerun the same command")
        if peers.is_leader:
            reading.mark_verified()
