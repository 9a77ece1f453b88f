"""The supervisor's side of the memory tier: it owns the files and drains them to the disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from elastic_ckpt.checkpoint.catalog import newest_of_job
from elastic_ckpt.checkpoint.memory.generation import GENERATIONS, Sealed
from elastic_ckpt.checkpoint.memory.room import room_bytes
from elastic_ckpt.checkpoint.memory.tier import MemoryUnusable, OwnedTier, sweep
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.events import MemoryAdopted, MemoryRemoved
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.supervisor.ports import NO_CHECKPOINT, Key
from elastic_ckpt.supervisor.saves.drainer import Drainer
from elastic_ckpt.supervisor.settings import RunSettings
from elastic_ckpt.util.units import human_bytes


class MemoryKeeper:
    """A node's memory tier while its supervisor lives; an empty one if the tier is off."""

    def __init__(self, owned: OwnedTier | None, drainer: Drainer | None) -> None:
        self._owned = owned
        self._drainer = drainer
        self.root = str(owned.tier.root) if owned else ""
        self.bell = owned.bell if owned else None

    @classmethod
    def open(
        cls,
        settings: RunSettings,
        job: JobDirectory,
        journal: Journal,
        say: Callable[[str], None],
        wake: Callable[[], None],
    ) -> MemoryKeeper:
        """Make the tier, or take over what a killed run left there and begin to drain it. If the
        place is not usable the tier is off, with a message."""
        place = settings.memory
        if place is None:
            return cls(None, None)
        for path in sweep(place):
            journal.write(MemoryRemoved(path=str(path)))
        try:
            owned = OwnedTier(place, job, settings.node)
        except MemoryUnusable as error:
            say(f"no memory tier, saves go to the disk: {error}")
            return cls(None, None)
        say(_needs(place, job, owned))
        drainer = Drainer(job, owned.tier, journal, say, wake)
        adopted = drainer.adopt()
        for one in adopted:
            say(f"step {one.seal.step} of a killed run is in memory: bringing it to the disk")
            journal.write(MemoryAdopted(step=one.seal.step, path=str(one.generation.slot)))
        drainer.hurry()
        return cls(owned, drainer)

    @property
    def attempt(self) -> str:
        return self._drainer.attempt if self._drainer else ""

    @property
    def over(self) -> bool:
        return self._drainer is None or self._drainer.over

    def serve(self) -> None:
        if self._drainer is None or self.bell is None:
            return
        rung = False
        with contextlib.suppress(BlockingIOError):
            rung = bool(os.read(self.bell, 4096))
        self._drainer.serve(sealed=rung)

    def hold(self) -> None:
        if self._drainer is not None:
            self._drainer.hold()

    def hurry(self) -> None:
        if self._drainer is not None:
            self._drainer.hurry()

    def hurry_once(self) -> None:
        if self._drainer is not None:
            self._drainer.hurry_once()

    def calm(self) -> None:
        if self._drainer is not None:
            self._drainer.calm()

    def newest_key(self) -> Key:
        sealed = self._owned.tier.sealed() if self._owned else []
        return sealed[0].age if sealed else NO_CHECKPOINT

    def forget(self, key: Key | None) -> bool:
        sealed = self._owned.tier.sealed() if self._owned else []
        if sealed and not sealed[0].settled:
            return False
        return all(one.generation.clear() for one in sealed if one.age == key)

    def not_on_disk(self) -> Sealed | None:
        sealed = self._owned.tier.sealed() if self._owned else []
        return sealed[0] if sealed and not sealed[0].settled else None

    def finish_pruning(self, hurry: Callable[[], bool]) -> None:
        if self._drainer is not None:
            self._drainer.finish_pruning(hurry)

    def close(self) -> None:
        if self._owned is not None and self._drainer is not None:
            self._owned.release(remove=not self._drainer.pending())


def _needs(place: Path, job: JobDirectory, owned: OwnedTier) -> str:
    room = human_bytes(room_bytes(place) + owned.tier.held_bytes())
    with contextlib.suppress(OSError):
        newest = newest_of_job(job)
        if newest is not None and newest.manifest is not None:
            needed = human_bytes(GENERATIONS * newest.manifest.total_bytes)
            return f"memory tier in {place}: needs about {needed} of {room}"
    return f"memory tier in {place}: {room} available; it needs twice the size of a checkpoint"
