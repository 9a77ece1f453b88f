"""How many failures in a row a job has had when another node takes the head's place."""

from __future__ import annotations

from collections.abc import Iterable

from elastic_ckpt.journal.events import Crashed, RunStarted, Saved
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.journal.node_events import HeadTakenOver
from elastic_ckpt.policy.failure import FailureClass
from elastic_ckpt.policy.restart import RULES

_COUNTED = {kind.value for kind in FailureClass if RULES[kind].counts}


def failures_in_a_row(entries: Iterable[JournalEntry], node: str, pid: int) -> int:
    """Return how many failures lie behind the newest save that the failure budget counts.

    A run that a user starts has a budget of its own, one that continues for a lost head has not.

    Args:
        entries: a job's journal, in order of time.
        node, pid: of the process that takes the head's place; its own starts are not a user's.
    """
    count = before = 0
    for entry in entries:
        if entry.event.follows:
            continue
        match entry.event:
            case RunStarted() if (entry.node, entry.pid) != (node, pid):
                count, before = 0, count
            case HeadTakenOver() if not count:
                count = before
            case Saved():
                count = before = 0
            case Crashed(kind=kind) if kind in _COUNTED:
                count += 1
    return count
