"""What a framework writes: announced to the supervisor, which seals it; sealed here without one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from elastic_ckpt.checkpoint.own.announced import announce, announced
from elastic_ckpt.checkpoint.own.files import matches
from elastic_ckpt.checkpoint.own.keeper import OwnKeeper
from elastic_ckpt.checkpoint.own.reports import Reports
from elastic_ckpt.checkpoint.own.seal import seals, verify
from elastic_ckpt.errors import CheckpointError
from elastic_ckpt.journal.events import Quarantined
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.util.progress import ignore, unwatched


class OwnCheckpoints:
    """The checkpoints of one framework in a job. Every method is collective."""

    def __init__(self, runtime: Runtime, pattern: str, complete_when: str) -> None:
        """Announce an absolute pattern, for this run and for later ones.

        Raises:
            UsageError, DirectoryUnusable, SaveFailed: on every rank; it could not be announced.
        """
        self._runtime, self._pattern = runtime, pattern
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

        Every byte is verified by the leader.

        Raises:
            SaveFailed: on every rank; the leader could not look.
        """
        if self._newest is None:
            peers = self._runtime.peers
            path = peers.leader_does("look for the newest checkpoint", self._find) or ""
            self._newest = os.fsdecode(peers.tell("newest", os.fsencode(path)))
        return self._newest

    def _find(self) -> str:
        if self._keeper is not None:
            return self._keeper.prepare(lambda: False)
        for one in seals(self._runtime.job):  # a hostile one may name any path
            if matches((self._pattern,), Path("/"), Path(one.path)):
                with contextlib.suppress(CheckpointError, OSError):
                    verify(one, ignore)
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
