"""Predicts how long an emergency save takes, and compares it with how long it took."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from elastic_ckpt.journal.bucket_events import Mirrored
from elastic_ckpt.journal.events import Drained, EmergencySaved, Saved
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.journal.node_events import Replicated
from elastic_ckpt.policy.emergency import EmergencyChoice, Outlook, choose, save_seconds
from elastic_ckpt.policy.prediction import Predictor, Route, rest_of_step
from elastic_ckpt.protocol.slot import Phase, Slot
from elastic_ckpt.supervisor.ports import DirectoryPort

_ROUTES: Final = {"memory": Route.MEMORY, "disk": Route.DISK, "bucket": Route.DISK}
"""Which route a save measures, by its tier; a job has its disk or its bucket, not both."""

PIECE_BYTES: Final = 16 * 1024 * 1024
"""A replica of less takes as long."""

LATE_SECONDS: Final = 1.0
"""A step of this length is never late, however short the others are."""


class SaveForecast:
    """Learns from the journal, and compares predictions with results; its ``predictor`` is also of
    the runs before."""

    def __init__(
        self, directory: DirectoryPort, journal: Journal, *, uploads: bool = False
    ) -> None:
        """``uploads``: what is on the disk counts once a bucket has it, too."""
        self.predictor: Predictor = directory.read_predictor()
        self._directory = directory
        self._journal = journal
        self._uploads = uploads
        self._learned = False
        self._replica_bytes = 0  # of what was learned of replicas, in this run
        self._noticed = 0.0
        self._waiting = False
        self._predicted: float | None = None

    def outlook(
        self,
        grace_left: float,
        slots: Iterable[Slot],
        now: float,
        undrained_bytes: int | None,
        saving_seconds: float | None = None,
    ) -> Outlook:
        """Return the situation under a notice, at ``now``; further arguments as in Outlook. The
        board's ``slots`` show how far the running step is."""
        # A rank that is saving waits for those in their step.
        steps = [slot for slot in slots if slot.phase is not Phase.SAVING]
        return Outlook(
            grace_left=grace_left,
            rest_of_step=max((seconds_to_boundary(slot, now) for slot in steps), default=0.0),
            save_bytes=self.predictor.last_bytes,
            undrained_bytes=undrained_bytes,
            saving_seconds=saving_seconds,
            is_late=any(_is_late(slot, now) for slot in steps),
            uploads=self._uploads,
        )

    def noticed(self, outlook: Outlook, now: float) -> EmergencyChoice:
        """Return what to do on a notice; the first prediction is compared with the result."""
        if not self._waiting:
            self._waiting, self._noticed = True, now
            to_disk = replace(outlook, uploads=False)
            self._predicted = save_seconds(self.predictor, to_disk) if outlook.save_bytes else None
        return choose(self.predictor, outlook)

    def seconds(self) -> float | None:
        """Return what a full save takes at worst, with its upload, in seconds; None if unknown."""
        size = self.predictor.last_bytes
        outlook = Outlook(math.inf, 0.0, size, uploads=self._uploads)
        return save_seconds(self.predictor, outlook) if size else None

    def of_a_node_that_leaves(self, nodes: int, grace: float) -> EmergencyChoice:
        """Return what is best if one of ``nodes`` nodes gets a notice of ``grace`` seconds."""
        size = self.predictor.last_bytes
        return choose(self.predictor, Outlook(grace, 0.0, size, peer_bytes=size // nodes))

    def learn(self, entry: JournalEntry) -> None:
        """Take a new entry of this node's journal into account."""
        match entry.event:
            case (
                Saved(
                    tier="memory" | "disk" | "bucket" as tier, bytes=size, seconds=seconds
                ) as event
            ):
                self._observe(_ROUTES[tier], size, seconds)
                if self._waiting and event.reason == "emergency":
                    self._compare(event.step, entry.monotonic)
            case Mirrored(sent_bytes=size) as event:
                self._observe(Route.UPLOAD, size, event.seconds - event.paused_seconds)
            case Drained(bytes=size, seconds=seconds):
                self._observe(Route.DRAIN, size, seconds)
            case Replicated(bytes=size, seconds=seconds):
                self._observe_replica(size, seconds)

    def keep(self) -> None:
        """Keep what was learned for the next run."""
        if self._learned:
            self._directory.write_predictor(copy.deepcopy(self.predictor))
            self._learned = False

    def _observe(self, route: Route, size: int | None, seconds: float) -> None:
        self.predictor.observe(route, size or 0, seconds)
        self._learned = True

    def _observe_replica(self, size: int, seconds: float) -> None:
        """Take the fastest replica of the largest alone: they are made at the lowest priority,
        unless a node waits for one, and what a small one takes says nothing of a byte."""
        size = max(size, PIECE_BYTES)
        expected = self.predictor.expect(Route.PEER, size)
        is_faster = expected is None or (seconds < expected and 2 * size > self._replica_bytes)
        if is_faster or size > 2 * self._replica_bytes:
            self._replica_bytes = size
            self.predictor.routes.pop(Route.PEER, None)
            self._observe(Route.PEER, size, seconds)

    def _compare(self, step: int, saved_at: float) -> None:
        """Journal how long the emergency save took, from the notice until it was on the disk."""
        self._journal.write(
            EmergencySaved(
                step=step,
                predicted_seconds=self._predicted,
                actual_seconds=saved_at - self._noticed,
            )
        )


def step_seconds(slot: Slot) -> float:
    """Return the mean seconds of a rank's steps in this incarnation; 0 if unknown."""
    done = slot.finished - slot.start_step
    if not slot.attached or not slot.first_entry or done <= 0:
        return 0.0
    return (slot.beat - slot.first_entry) / 1e9 / done


def seconds_to_boundary(slot: Slot, now: float) -> float:
    """Return the seconds until a rank finishes its step, judging by its earlier steps."""
    average = step_seconds(slot)
    return rest_of_step(average, now - slot.beat / 1e9) if average else 0.0


def _is_late(slot: Slot, now: float) -> bool:
    """Return whether a rank's step says nothing of when it ends: it evaluates, or hangs."""
    elapsed = now - slot.beat / 1e9
    return slot.attached and elapsed > max(2 * step_seconds(slot), LATE_SECONDS)
