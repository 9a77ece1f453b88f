"""The nodes of a job as ``status`` shows them."""

from __future__ import annotations

import time

import msgspec

from elastic_ckpt.jobdir.left_out import read_left_out
from elastic_ckpt.jobdir.node_record import NodeRecord
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import command_line
from elastic_ckpt.protocol.run_state import TERMINAL, RunState


class NodeView(msgspec.Struct):
    """One node of a multi-node job; ``alive`` as for a supervisor.

    Attributes:
        since: when its supervisor started, or got its place in the job, in seconds since the epoch.
        took_over_from: the node that led before this one; empty if the job began with it.
    """

    node: str
    host: str
    leads: bool
    state: str
    message: str
    alive: bool | None
    since: float = 0.0
    took_over_from: str = ""


class LeftOutView(msgspec.Struct):
    """A node that the job leaves out, since when in seconds since the epoch, and why.

    Attributes:
        takes_part: it is in the running incarnation all the same, because the job needs it.
        let_in: what to type to let it in.
    """

    node: str
    since: float
    why: str
    takes_part: bool
    let_in: str

    @property
    def what(self) -> str:
        """One line for people, without the command."""
        clock = time.strftime("%H:%M:%S", time.localtime(self.since))
        but = "; takes part, as too few others are fit" if self.takes_part else ""
        return f"node {self.node} is left out since {clock}: {self.why}{but}"

    @property
    def text(self) -> str:
        """The same, with the command."""
        return f"{self.what}; to let it in again: {self.let_in}"


def left_out_views(
    job: JobDirectory, record: NodeRecord | None, run: list[NodeRecord]
) -> list[LeftOutView]:
    """Return the nodes that a job leaves out."""
    current = record.incarnation if record is not None else 0
    taking_part = {
        one.node for one in run if one.incarnation == current and one.state is RunState.RUNNING
    }
    return [
        LeftOutView(
            one.node,
            one.since,
            one.why,
            one.node in taking_part,
            command_line("nodes", one.url or job.root, "--let-in", one.node),
        )
        for one in read_left_out(job)
    ]


def node_views(record: NodeRecord | None, run: list[NodeRecord]) -> list[NodeView]:
    """Return the nodes of a multi-node job, including those about to leave."""
    if record is None or not record.present:
        return []
    shown = [one for one in run if one.node in record.present or one.owner.is_alive()]
    return [
        NodeView(
            one.node,
            one.owner.host,
            one.leads,
            one.state.value,
            one.message,
            one.owner.is_alive(),
            one.since,
            one.took_over_from,
        )
        for one in sorted(shown, key=lambda one: (not one.leads, one.node))
    ]


def shown_record(records: list[NodeRecord]) -> NodeRecord | None:
    """Return the record of the node that leads; of one that takes its place while it is dead."""
    head = next((one for one in records if one.leads), None)
    if head is None:
        return next(iter(records), None)
    if head.state in TERMINAL or head.owner.is_alive() is not False:
        return head
    return next((one for one in records if _looks_for(one, head)), head)


def _looks_for(one: NodeRecord, head: NodeRecord) -> bool:
    is_of_run = one.run_id == head.run_id and one.head == head.node and one is not head
    return is_of_run and one.state not in TERMINAL and one.owner.is_alive() is True
