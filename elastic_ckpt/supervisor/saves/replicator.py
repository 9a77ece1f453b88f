"""Keeps replicas of other nodes' shares in this node's memory, while the job trains.

A thread of the lowest priority follows what this node has sealed: its seal says whose shares of
that checkpoint to keep. The loop writes down what came of it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Final

from elastic_ckpt.checkpoint.memory.seal import MemorySeal, Share
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.nodes.replica import drop_strangers, replicate
from elastic_ckpt.errors import CheckpointRejected, ElasticCkptError
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.journal.node_events import ReplicaFailed, Replicated
from elastic_ckpt.policy.pace import Pace, Throttle
from elastic_ckpt.util.journald import warning

_PATIENCE_SECONDS: Final = 5.0
"""Another node may seal its share a moment after this one, and may be held up meanwhile."""

_PAUSE_SECONDS: Final = 0.1


class Replicator:
    """Not thread-safe: the supervisor's loop calls everything."""

    def __init__(
        self,
        tier: MemoryTier,
        journal: Journal,
        say: Callable[[str], None],
        wake: Callable[[], None],
        be_polite: Callable[[], None],
        finished: Callable[[], int],
    ) -> None:
        """Start the thread; ``wake`` ends the loop's wait, ``be_polite`` lowers its priority.

        Args:
            finished: steps that all ranks have finished; a copy pauses where they come slower than
                without one.
        """
        self._tier = tier
        self._journal = journal
        self._say = say
        self._wake = wake
        self._be_polite = be_polite
        self._finished = finished
        self._pace = Pace()
        self._is_copying = False
        self._wanted: queue.Queue[MemorySeal | None] = queue.Queue()
        self._done: queue.Queue[Replicated | ReplicaFailed] = queue.Queue()
        self._last = ""
        self._said = ""
        self._closing = threading.Event()
        threading.Thread(target=self._work, name="replicas", daemon=True).start()

    def serve(self, *, sealed: bool) -> None:
        """Write down what was done, and begin with what a worker has ``sealed``."""
        self._pace.feed(time.monotonic(), self._finished(), copying=self._is_copying)
        if sealed:
            # A job that went back behind what is in memory seals lower steps, or the same again.
            seals = [one.seal for one in self._tier.sealed()]
            newest = max(seals, key=lambda one: (one.run, one.incarnation, one.age), default=None)
            if newest is not None and newest.attempt != self._last:
                self._last = newest.attempt
                self._wanted.put(newest)
        while not self._done.empty():
            event = self._done.get()
            self._journal.write(event)
            if isinstance(event, ReplicaFailed) and event.error != self._said:
                self._said = event.error
                self._say(
                    warning(
                        f"no replica of {event.host}'s part of step {event.step}: {event.error}"
                    )
                )

    def close(self) -> None:
        """Give up what is under way."""
        self._closing.set()
        self._wanted.put(None)

    def _work(self) -> None:
        self._be_polite()
        while (seal := self._wanted.get()) is not None:
            while not self._wanted.empty():  # only the newest counts
                newer = self._wanted.get()
                if newer is None:
                    return
                seal = newer
            if not seal.guards and seal.share is not None and not seal.share.leaves:
                drop_strangers(self._tier.root, (), seal)  # there is no other node any more
            for share in seal.guards:
                self._is_copying = True
                self._done.put(self._replicate(share, seal))
                self._is_copying = False
                self._wake()

    def _replicate(self, share: Share, seal: MemorySeal) -> Replicated | ReplicaFailed:
        began, cpu = time.monotonic(), time.thread_time()
        throttle = Throttle(0.0, began)

        def pause(count: int) -> None:
            seconds = throttle.pause(count, time.monotonic(), slowed=self._pace.is_slowed)
            if self._closing.wait(seconds):
                raise CheckpointRejected("this node leaves")

        while True:
            try:
                made = replicate(self._tier.root, share, seal.attempt, pause)
                drop_strangers(self._tier.root, seal.guards, made.seal)
            except CheckpointRejected as error:
                is_early = time.monotonic() < began + _PATIENCE_SECONDS
                if is_early and not self._closing.wait(_PAUSE_SECONDS):
                    continue
                return ReplicaFailed(share.host, seal.step, str(error))
            except (ElasticCkptError, OSError) as error:
                return ReplicaFailed(share.host, seal.step, str(error))
            return Replicated(
                host=share.host,
                step=seal.step,
                bytes=made.seal.total_bytes,
                seconds=time.monotonic() - began,
                cpu_seconds=time.thread_time() - cpu,
            )
