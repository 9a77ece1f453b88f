"""What is left to a node's next supervisor when its role changes."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ckpt.checkpoint.nodes.server import MemoryServer
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.succession import NO_PLACE, Lead, Leader, RosterPlace
from elastic_ckpt.supervisor.agent_client import AgentProcess
from elastic_ckpt.supervisor.cluster.role import ClusterRole
from elastic_ckpt.supervisor.saves.memory_keeper import MemoryKeeper
from elastic_ckpt.supervisor.supervisor import Supervisor
from elastic_ckpt.supervisor.systemd import Service
from elastic_ckpt.supervisor.watch.node_check import NodeCheck


@dataclass(frozen=True)
class Handed:
    """What a supervisor leaves to the next one of its process, which has another role.

    Attributes:
        place: this node's in the order of succession.
        taken: the run that this node takes the place of; None if it follows.
        agent: its agent, without workers; None if it had none.
        check: this node's; None if it needs none.
        server: what serves its memory; None if where the shares are is not known any more.
    """

    board: Board
    service: Service
    place: RosterPlace
    check: NodeCheck | None
    taken: Leader | None = None
    agent: AgentProcess | None = None
    server: MemoryServer | None = None

    @classmethod
    def of(cls, before: Supervisor) -> Handed:
        """Return what a supervisor leaves that has ended, with ``goes_on`` set."""
        role = before.role if isinstance(before.role, ClusterRole) else None
        place = role.place if role else NO_PLACE
        taken = before.goes_on.leader if isinstance(before.goes_on, Lead) else None
        agent = before.agent if isinstance(before.agent, AgentProcess) else None
        check, memory = role.check if role else None, before.ports.memory
        server: MemoryServer | None = None
        if isinstance(memory, MemoryKeeper):
            server = memory.hand_server(is_passed_on=role is not None and role.is_passed_on)
        return cls(before.ports.board, before.ports.service, place, check, taken, agent, server)
