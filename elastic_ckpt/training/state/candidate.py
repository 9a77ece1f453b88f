"""A checkpoint that may be loaded: locked, verified by all ranks, and checked again afterwards."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from elastic_ckpt.checkpoint.manifest import Manifest
from elastic_ckpt.checkpoint.memory.seal import MemorySeal
from elastic_ckpt.checkpoint.tier import Ranges, Reading, Ref, Tier
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.journal.events import CheckpointVerified
from elastic_ckpt.protocol.slot import Source
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.util.progress import QUIET_SECONDS, Watch, in_lines, unwatched
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import human_duration

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was loaded: its seal, and its tier."""

    seal: Manifest | MemorySeal
    source: Source


@dataclass(frozen=True)
class Readable(Loaded):
    """A checkpoint during its load. Afterwards ``path`` is gone if it came from other nodes."""

    path: Path


class LoadCandidate:
    """A checkpoint from its choice to the end of its load: a context manager, in which no process
    deletes it. Every method is collective."""

    def __init__(self, runtime: Runtime, tier: Tier, ref: Ref) -> None:
        self._runtime = runtime
        self._tier = tier
        self._reading: Reading | None = None
        self._held = ExitStack()
        self.ref = ref

    def __enter__(self) -> LoadCandidate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the checkpoint; not collective. A repeat does nothing."""
        self._held.close()

    def verify(self) -> str:
        """Verify it, each rank a share of its files; return why it cannot be loaded, if so."""
        started, where = time.monotonic(), self._tier.where(self.ref)
        log.info("verifying %s", where)
        reason = self._vote("verify", self._verify_share)
        seconds = time.monotonic() - started
        log.info("%s, after %.3f s", f"rejected: {reason}" if reason else "verified", seconds)
        if self._runtime.peers.is_leader:
            self._write_verified(reason, seconds)
            if seconds >= QUIET_SECONDS and not reason:  # the load has no bytes to count
                self._runtime.say(
                    f"{where}: verified in {human_duration(seconds)}; the load takes about as long"
                )
        return reason

    def _write_verified(self, reason: str, seconds: float) -> None:
        where = self._tier.where(self.ref)
        how = "every byte" if self._tier.every_byte else "sizes, in memory"
        if self._reading is not None and self._reading.rest is not None:
            how = "every byte that is fetched"
        self._runtime.journal.write(
            CheckpointVerified(path=where, intact=not reason, why=reason, how=how, seconds=seconds)
        )

    @property
    def _watch(self) -> Watch:
        return in_lines(self._runtime.say) if self._runtime.peers.is_leader else unwatched

    def _verify_share(self) -> None:
        peers = self._runtime.peers
        reading = self._tier.open(self.ref)
        self._held.callback(reading.close)
        reading.verify(peers.rank, peers.world_size, self._watch)
        self._reading = reading

    def _vote(self, doing: str, check: Callable[[], None]) -> str:
        """Return why the first rank that rejects the checkpoint does; empty if all accept it."""

        def vote() -> bytes:
            try:
                check()
            except CheckpointRejected as error:
                return printable(str(error)).encode()
            return b""

        peers = self._runtime.peers
        votes = peers.collect(f"{doing}-vote", vote, doing=doing)
        return peers.tell(f"{doing}-verdict", next(filter(None, votes), b"")).decode()

    def bring(self, ranges: Callable[[], Ranges | None]) -> str:
        """Bring what the ranks read of large files, unless it is here; return why the checkpoint
        cannot be loaded, if so.

        Args:
            ranges: returns what this rank reads, as :meth:`Engine.ranges`.
        """
        rest = self._verified.rest
        if rest is None:
            return ""
        peers, watch = self._runtime.peers, self._watch

        def want() -> bytes:
            rest.want(ranges())
            return b""

        peers.collect("want", want, doing="load")
        reason = self._vote("bring", lambda: rest.bring(watch))
        if reason and peers.is_leader:
            self._write_verified(reason, 0.0)
        return reason

    def settle(self) -> None:
        """Note what was brought, so that :meth:`confirm` sees changes; not collective."""
        if (rest := self._verified.rest) is not None:
            rest.settle()

    @property
    def _verified(self) -> Reading:
        assert self._reading is not None, "load only what verify() has accepted"
        return self._reading

    @property
    def loaded(self) -> Readable:
        """The checkpoint to load, once :meth:`verify` has accepted it. Not collective."""
        reading = self._verified
        return Readable(reading.seal, Source[self.ref.tier.upper()], reading.path)

    def confirm(self) -> None:
        """Raise CheckpointRejected on every rank if its files changed while they were loaded."""
        reading = self._verified
        changed = self._vote("load", reading.confirm)
        if changed:
            name = reading.seal.checkpoint_name
            raise CheckpointRejected(f"{name}: {changed}; rerun the same command")
        if self._runtime.peers.is_leader:
            reading.mark_verified()
