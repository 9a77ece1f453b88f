"""The journal's events of several nodes; conventions as in ``events.py``."""

from __future__ import annotations

from elastic_ckpt.journal.events import Count, JournalEvent, Seconds


class WaitingForNodes(JournalEvent, frozen=True, tag="waiting"):
    """Fewer nodes are present than the job needs."""

    present: Count | None = None
    needed: Count | None = None


class NodeJoined(JournalEvent, frozen=True, tag="node_joined"):
    """A node joined the job."""

    name: str = ""


class NodeLeft(JournalEvent, frozen=True, tag="node_left"):
    """A node left the job."""

    name: str = ""


class NodeUnfit(JournalEvent, frozen=True, tag="node_unfit"):
    """This node's own check failed, in the part that ``why`` begins with."""

    why: str = ""


class NodeLeftOut(JournalEvent, frozen=True, tag="node_left_out"):
    """The job leaves a node out."""

    name: str = ""
    why: str = ""


class NodeLetIn(JournalEvent, frozen=True, tag="node_let_in"):
    """The job lets a node in again, by command or because its check passes."""

    name: str = ""
    why: str = ""


class HeadNodeLost(JournalEvent, frozen=True, tag="head_lost"):
    """This node lost its head."""

    head: str = ""
    why: str = ""


class HeadTakenOver(JournalEvent, frozen=True, tag="head_taken_over"):
    """This node leads from now on.

    Attributes:
        before: the node that led.
        run: the run number that this node has taken.
        endpoint: where the nodes meet from now on.
    """

    before: str = ""
    run: Count | None = None
    endpoint: str = ""


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
