"""What a cluster member talks to: its node's workers, and the other nodes."""

from __future__ import annotations

from typing import Any, Protocol

from elastic_ckpt.protocol.agreement import RequestAnswer
from elastic_ckpt.protocol.cluster import JobState, MemberState, NodeAnswer, Seen
from elastic_ckpt.protocol.rendezvous import Rendezvous
from elastic_ckpt.supervisor.agent.launch import NodeRank


class LocalWorkers(Protocol):
    """This node's workers."""

    def begin(self, node_rank: NodeRank) -> None:
        """Launch the workers of an incarnation."""

    def flag(self, number: int) -> NodeAnswer:
        """Raise a request's flag and return this node's answer."""

    def post(self, answer: RequestAnswer, *, idle: bool) -> None:
        """Publish the job's answer; if it is ``idle``, end workers with nothing to save."""

    def cut_short(self) -> None:
        """End the workers because of another node."""

    @property
    def busy(self) -> bool:
        """Whether an incarnation runs."""

    @property
    def is_warm(self) -> bool:
        """Whether workers would start without a wait for imports."""

    @property
    def answered(self) -> int:
        """The newest request whose answer is posted."""

    @property
    def flagged(self) -> int:
        """The newest request whose flag is raised."""

    @property
    def seen(self) -> int:
        """The newest request that all ranks have seen."""


class Link(Protocol):
    """This node's connection to the head: :class:`hub_link.HubLink`, on the head itself
    :class:`hub.Hub`."""

    number: int
    broken: str

    @property
    def job(self) -> JobState | None:
        """The head's newest report; None before the first."""

    @property
    def heard(self) -> tuple[dict[int, Seen], float]:
        """On the head the members' reports by number, and the time at which they were read."""

    @property
    def heard_at(self) -> float:
        """When the head was last alive, in monotonic seconds."""

    def say(self, mine: MemberState, job: JobState | None) -> None:
        """Report this from now on; the caller may change the structs afterwards."""

    def close(self) -> None:
        """Send the last report, and close without waiting."""


class Network(Protocol):
    """Connects the nodes of a job."""

    def host_workers(self, address: str) -> Any:
        """Return a store for the workers of one incarnation; its ``port`` is where it listens."""

    def connect(self, rendezvous: Rendezvous, mine: MemberState, job: JobState | None) -> Link:
        """Return a connection that is being made to the head; on the head, which gives ``job``,
        the hub that the others connect to."""
