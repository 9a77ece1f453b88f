"""What a framework writes: announced to the supervisor, which seals it; sealed here without one."""

from __future__ import annotations

import os
from pathlib import Path

from elastic_ckpt.checkpoint.own.announced import announce, announced
from elastic_ckpt.checkpoint.own.keeper import OwnKeeper
from elastic_ckpt.checkpoint.own.reports import Reports
from elastic_ckpt.checkpoint.own.seal import seals, where_intact
from elastic_ckpt.errors import CheckpointError
from elastic_ckpt.journal.events import Quarantined
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.util.progress import unwatched


class OwnCheckpoints:
    """The checkpoints of one framework in a job. Every method is collective."""

    def __init__(self, runtime: Runtime, pattern: str, complete_when: str) -> None:
        """Announce an absolute pattern, for this run and for later ones.

        Raises:
            UsageError, DirectoryUnusable, SaveFailed: on every rank; it could not be announced.
        """
        self._runtime = runtime
        self._keeper: OwnKeeper | None = None
        self._newest: str | None = None
        runtime.peers.leader_does(
            "announce", lambda: announce(runtime.job.session(""), pattern, complete_when)
        )
        if runtime.supervised is None and runtime.peers.is_leader:
            reports = Reports(lambda _: None, self._tell_aside, unwatched, runtime.say)
            self._keeper = OwnKeeper(
                runtime.job, announced(runtime.job), Path.cwd(), runtime.fence.number,
                runtime.retain.rule, reports,
            )  # fmt: skip

    def newest(self) -> str:
        """Return the path of the newest intact checkpoint, the same on every rank; empty if none.

        A supervisor has verified it before the launch; without one it is verified here.
        """
        if self._newest is None:
            path = self._find() if self._runtime.peers.is_leader else ""
            told = self._runtime.peers.tell("newest", os.fsencode(path))
            self._newest = os.fsdecode(told)
        return self._newest

    def _find(self) -> str:
        if self._keeper is not None:
            return self._keeper.prepare(lambda: False)
        job = self._runtime.job
        for one in seals(job):
            try:
                where_intact(job, one)
            except (CheckpointError, OSError):
                continue
            return one.path
        return ""

    def written(self) -> None:
        """Have what was just written sealed: at once without a supervisor, else soon, by it.

        Raises:
            SaveFailed: on every rank; the leader could not seal it.
        """
        keeper = self._keeper
        if self._runtime.supervised is None:
            self._runtime.peers.leader_does(
                "seal", lambda: keeper.settle(left_well=True) if keeper else None
            )

    def _tell_aside(self, path: Path, target: Path, why: str) -> None:
        self._runtime.journal.write(Quarantined(path=str(path), to=str(target), reason=why))
        self._runtime.say(f"set {path} aside, in {target}: {why}")
