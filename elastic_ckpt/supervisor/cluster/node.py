"""What the supervisors of all nodes of a job do alike: a hang takes the ranks of every node."""

from __future__ import annotations

from elastic_ckpt.protocol.messages import AgentEvent, AllIdle, Explained, Idle
from elastic_ckpt.supervisor.supervisor import Supervisor


class OneOfSeveral(Supervisor):
    """A supervisor that says when its ranks are idle, and looks at them when all nodes' are."""

    _told_idle = False
    _all_idle = False

    def _begin_incarnation(self, number: int, nodes: int) -> None:
        self._told_idle = self._all_idle = False
        super()._begin_incarnation(number, nodes)

    def _on_event(self, event: AgentEvent) -> None:
        if isinstance(event, AllIdle):
            self._all_idle = True
        else:
            super()._on_event(event)

    def _look_for_hang(self) -> None:
        if not self._launched or self._agent is None:
            return
        stuck = self._hangs.look(alone=self._all_idle)
        if self._hangs.idle is not self._told_idle:
            self._told_idle = self._hangs.idle
            self._agent.send(Idle(self._told_idle))
        if stuck is not None:
            self._agent.send(Explained(stuck))
