"""Which checkpoint a load takes. The leader decides; every function is collective."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.catalog import candidates
from elastic_ckpt.checkpoint.memory.tier import Sealed, check_covers
from elastic_ckpt.checkpoint.quarantine import set_aside
from elastic_ckpt.errors import CheckpointRejected, NotSealed, NoUsableCheckpoint
from elastic_ckpt.jobdir.paths import checkpoint_key
from elastic_ckpt.journal.events import MemoryRefused, Quarantined
from elastic_ckpt.training.runtime import Runtime

MAX_QUARANTINED: Final = 2
"""After this many bad checkpoints in a row the job stops: something else is wrong."""


class CheckpointChoice:
    """Chooses the newest checkpoint, and the next older one after each that is rejected."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._set_aside = 0
        self._rejected: set[Path] = set()

    def newest(self) -> Path | None:
        """Return the newest checkpoint that was not rejected; None if there are no checkpoints.

        Raises:
            NoUsableCheckpoint: there are checkpoints, but none is usable, or too many in a row
                were bad.
        """
        peers = self._runtime.peers
        chosen = peers.leader_does("choose", self._choose)
        path = peers.tell("chosen", str(chosen or "").encode()).decode()
        return Path(path) if path else None

    def reject(self, path: Path, reason: str, *, in_memory: bool) -> None:
        """Do not choose this checkpoint again. On disk it is set aside."""
        self._rejected.add(path)

        def reject() -> None:
            if in_memory:
                self._runtime.journal.write(MemoryRefused(path=str(path), reason=reason))
            elif os.path.lexists(path):  # it may have been deleted meanwhile
                self._quarantine(path, reason)
                self._set_aside += 1

        self._runtime.peers.leader_does("reject", reject)

    def _choose(self) -> Path | None:
        job, bad = self._runtime.job, self._set_aside
        unsealed: list[str] = []
        held = self._newest_in_memory()
        for path, why in candidates(job):
            if held is not None and held.key >= (checkpoint_key(path.name) or (0, 0)):
                return held.generation.slot
            if bad >= MAX_QUARANTINED:
                raise NoUsableCheckpoint(
                    f"{bad} checkpoints in a row failed verification and were moved to "
                    f"{job.quarantine}: fix the storage, then rerun the same command to resume "
                    f"from an older one; elastic-ckpt list {job.root} shows them"
                )
            if why is None:
                return path
            if isinstance(why, NotSealed):
                unsealed.append(path.name)  # another program's: never moved, never chosen
                continue
            self._quarantine(path, str(why))
            bad += 1
        if held is not None:
            return held.generation.slot
        if bad or unsealed:
            raise NoUsableCheckpoint(
                f"no checkpoint in {job.root} is usable"
                + (f" ({', '.join(unsealed[:3])} not sealed)" if unsealed else "")
                + f": see elastic-ckpt list {job.root}, or start over with a new --dir"
            )
        return None

    def _newest_in_memory(self) -> Sealed | None:
        """Return the newest generation that these ranks can load."""
        runtime = self._runtime
        if runtime.memory is None:
            return None
        for held in runtime.memory.tier.sealed():
            if held.generation.slot not in self._rejected:
                with suppress(CheckpointRejected):
                    check_covers(held.seal, runtime.peers.world_size)
                    return held
        return None

    def _quarantine(self, path: Path, reason: str) -> None:
        target = set_aside(self._runtime.job, path, reason)
        self._runtime.journal.write(Quarantined(path=str(path), to=str(target), reason=reason))


def locate(runtime: Runtime, path: Path) -> Path:
    """Return where a given checkpoint is: its path, or a generation that is not on disk yet."""

    def look() -> Path:
        if not os.path.lexists(path) and runtime.memory is not None:
            for held in runtime.memory.tier.sealed():
                if runtime.job.checkpoint(*held.key) == path:
                    return held.generation.slot
        return path

    found = runtime.peers.leader_does("where", look)
    return Path(runtime.peers.tell("place", str(found or "").encode()).decode())
