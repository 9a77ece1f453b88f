"""One sentence for each event that the history lists and does not otherwise use."""

from __future__ import annotations

from elastic_ckpt.journal.audit_events import Audited
from elastic_ckpt.journal.events import (
    AttemptRecovered,
    DrainFailed,
    JobFileReloaded,
    JournalEvent,
    MemoryAdopted,
    NoticeSourceFailed,
    PruneFailed,
    RestoredInexactly,
    SaveIntervalChanged,
    WorldResized,
)
from elastic_ckpt.journal.node_events import (
    HeadNodeLost,
    HeadTakenOver,
    NodeJoined,
    NodeLeft,
    NodeLeftOut,
    NodeLetIn,
    NodeUnfit,
    WaitingForNodes,
)
from elastic_ckpt.util.text import printable


def sentence(event: JournalEvent) -> str | None:
    """Return what an incident's line says; None if the event is not an incident."""
    text = _of_nodes(event)
    match event:
        case MemoryAdopted():
            text = f"step {_known(event.step)}, left in memory by a killed run"
        case DrainFailed():
            text = f"step {_known(event.step)}: {event.error}"
        case RestoredInexactly():
            text = f"{_name(event.path)}: {event.reason}"
        case NoticeSourceFailed():
            text = f"{event.source}: {event.what}"
        case PruneFailed():
            text = f"{_name(event.path)}: {event.error}"
        case AttemptRecovered():
            text = f"{_name(event.path)}: {event.what}"
        case JobFileReloaded():
            text = event.said
        case WorldResized(before=before, now=now, step=step):
            text = f"from {_known(before)} to {_known(now)} ranks, at step {_known(step)}"
        case SaveIntervalChanged():
            text = event.why
    return None if text is None else printable(text)


def audited(event: Audited) -> str:
    """Return what a replay has found."""
    steps = f"steps {event.first + 1} to {event.last} on {event.ranks} ranks"
    if event.different:
        return printable(f"{steps}: different at {event.different}")
    return f"{steps}: equal within bounds" if event.bounds else f"{steps}: equal to the bit"


def _of_nodes(event: JournalEvent) -> str | None:
    match event:
        case NodeJoined() | NodeLeft():
            return event.name
        case NodeLeftOut() | NodeLetIn():
            return f"{event.name}: {event.why}"
        case NodeUnfit():
            return event.why
        case HeadNodeLost():
            return f"{event.head}: {event.why}"
        case HeadTakenOver():
            return f"from {event.before}, as run {_known(event.run)}, at {event.endpoint}"
        case WaitingForNodes(present=present, needed=needed):
            return f"{_known(present)} of {_known(needed)} nodes are here"
    return None


def _known(found: int | None) -> str:
    return "?" if found is None else str(found)


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or "a checkpoint"
