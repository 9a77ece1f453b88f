"""The journal's events of copies in other nodes' memory; conventions as in ``events.py``."""

from __future__ import annotations

from elastic_ckpt.journal.events import Count, JournalEvent, Seconds


class Replicated(JournalEvent, frozen=True, tag="replicated"):
    """This node has a copy of what ``host`` holds of a checkpoint in memory."""

    host: str = ""
    step: Count | None = None
    bytes: Count = 0
    seconds: Seconds = 0.0
    cpu_seconds: Seconds = 0.0


class ReplicaFailed(JournalEvent, frozen=True, tag="replica_failed"):
    """What ``host`` holds of a checkpoint in memory could not be copied here."""

    host: str = ""
    step: Count | None = None
    error: str = ""
