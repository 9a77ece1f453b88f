"""The supervisor of the node that leads several: who takes part, and when it is over for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from elastic_ckpt.policy.hang import Hang
from elastic_ckpt.protocol.agreement import RequestKind
from elastic_ckpt.protocol.cluster import Gathering
from elastic_ckpt.protocol.ended import Ended
from elastic_ckpt.protocol.messages import AgentEvent, Ask, Dismissed, Finish, Hung, Nodes
from elastic_ckpt.protocol.rendezvous import Rendezvous
from elastic_ckpt.protocol.run_state import Event
from elastic_ckpt.supervisor.cluster.node import OneOfSeveral
from elastic_ckpt.supervisor.settings import RunSettings
from elastic_ckpt.util.units import human_duration

DISMISS_SECONDS: Final = 5.0
"""How long the agent may take to tell the other nodes that the job is over."""

HURRIED_SECONDS: Final = 0.5
"""The same where this node's time is up."""

_NOBODY: Final = Nodes((), 0)


class Head(OneOfSeveral):
    """To its own ranks and notices it adds the coming and going of nodes."""

    def __init__(
        self,
        settings: RunSettings,
        say: Callable[[str], None],
        reread: Callable[[], RunSettings],
        rendezvous: Rendezvous,
    ) -> None:
        super().__init__(settings, say, reread, rendezvous)
        self._gathering = Gathering(*settings.nodes)
        self._nodes = _NOBODY
        self._waiting_since = 0.0
        self._growing = False
        self._account.say("no memory tier on several nodes: saves go to the disk that they share")

    def _on_event(self, event: AgentEvent) -> None:
        match event:
            case Nodes():
                self._on_nodes(event)
            case Hung():
                self._on_hang(Hang.of(event.nodes))
            case _:
                super()._on_event(event)

    def _on_nodes(self, nodes: Nodes) -> None:
        """Nodes came or went."""
        before, self._nodes = self._nodes, nodes
        for name in sorted(set(nodes.present) ^ set(before.present)):
            what = "joined" if name in nodes.present else "left"
            self._journal.write(f"node_{what}", name=name)
            self._account.say(f"node {name} {what}: {len(nodes.present)} here")
        self._account.update(present=nodes.present)

    def _on_ended(self, ended: Ended) -> None:
        self._gathering.expected = len(self._nodes.present)
        super()._on_ended(ended)

    def _on_agent_lost(self) -> None:
        self._nodes = _NOBODY  # they will come to the next one
        super()._on_agent_lost()

    def _serve_start(self, now: float) -> None:
        """Launch, once enough nodes are there; wait for them, bounded."""
        if not self._may_launch:
            return
        present, (least, most) = len(self._nodes.present), self._settings.nodes
        if self._gathering.may_launch(present, now):
            self._waiting_since = 0.0
            self._growing = False
            self._recover()  # which may take a while: who is there then?
            self._serve_agent()
            present = len(self._nodes.present)
            if present >= least and self._may_launch:
                self._launch(min(present, most))
        elif not self._waiting_since:
            self._waiting_since = now
            limit = human_duration(self._settings.gather_seconds)
            self._account.say(f"waiting for nodes, {limit} at most: {present} of {least} are here")
            self._journal.write("waiting", present=present, needed=least)
            self._account.update(message=f"waiting for nodes, of which it takes {least}")
        elif now - self._waiting_since > self._settings.gather_seconds:
            waited = f"fewer than {least} nodes for {self._settings.gather_seconds:.0f} s"
            self._ending.preempt_now(Event.ABANDONED, waited, begun=False)

    def _serve_running(self, now: float) -> None:
        """Besides saves, have the ranks stop for an incarnation with the nodes that came."""
        super()._serve_running(now)
        present, running = len(self._nodes.present), self._nodes.running
        if self._growing or not running or self._agent is None:
            return
        if self._gathering.may_grow(present, running, now):
            self._growing = True
            self._account.say(f"{present} nodes are here: saving, to go on with them")
            self._agent.send(Ask(RequestKind.STOP))

    def _take_leave(self) -> None:
        """Tell the other nodes that the job is over; they would look for the head."""
        code, agent = self._account.record.exit_code, self._agent
        if code is None or agent is None:
            return
        agent.send(Finish(code, self._account.record.message))
        hurried = self._preemption.left(time.monotonic()) < 1.0
        limit = time.monotonic() + (
            HURRIED_SECONDS if hurried or self._at_once else DISMISS_SECONDS
        )
        while time.monotonic() < limit and not agent.gone:
            self._wait()
            if any(isinstance(event, Dismissed) for event in agent.events()):
                return
