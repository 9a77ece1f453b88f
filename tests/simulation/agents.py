"""The agents: real cluster rules on several nodes, a short stand-in on one that is alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from elastic_ckpt.protocol.agreement import NOTHING_ENTERED, RequestAnswer, RequestKind
from elastic_ckpt.protocol.ended import Ended
from elastic_ckpt.protocol.messages import AgentEvent, Ask, Command, Kill, Launch, Ready
from elastic_ckpt.protocol.rendezvous import Rendezvous
from elastic_ckpt.protocol.worker_spec import WorkerSpec
from elastic_ckpt.supervisor.agent.cluster_member import Membership
from elastic_ckpt.supervisor.agent.launch import NodeRank
from elastic_ckpt.supervisor.settings import RunSettings
from tests.simulation.ranks import SimWorkers

if TYPE_CHECKING:
    from tests.simulation.network import SimLink, SimStore
    from tests.simulation.run import Run

TURN_SECONDS = 0.05
"""Within this time an agent looks at what has arrived."""


class AgentHandle:
    """The supervisor's end of an agent (``AgentPort``)."""

    fd = -1
    pid = 1
    is_intact = True

    def __init__(self, agent: SimAgent, interval_steps: int) -> None:
        self.interval_steps = interval_steps
        self.said: deque[AgentEvent] = deque()
        self._agent = agent

    @property
    def gone(self) -> bool:
        return self._agent.is_dead

    def send(self, command: Command) -> None:
        agent = self._agent
        if not agent.is_dead:
            later = agent.run.host.clock.blocked + agent.run.kernel.between(0.0005, 0.01)
            agent.run.host.after(later, lambda: agent.obey(command))

    def events(self) -> Iterator[AgentEvent]:
        while self.said:
            yield self.said.popleft()

    def end(self) -> None:
        self._agent.die()


class SimAgent:
    """An agent.

    Attributes:
        head: the run that leads, once this one has joined it.
    """

    def __init__(self, run: Run, settings: RunSettings) -> None:
        self.run = run
        self.kernel = run.kernel
        self.is_dead = False
        self.link: SimLink | None = None
        self.store: SimStore | None = None
        self.head: Run | None = run if run.leads else None
        self.workers = SimWorkers(self, run.world)
        self.handle = AgentHandle(self, settings.interval.worker_interval)
        self.membership: Membership | None = None
        self._turn_is_due = False
        self._alert_until = 0.0
        if run.world.size > 1:
            rendezvous = Rendezvous("head", 1, 3 if run.leads else -1)
            spec = WorkerSpec(
                script="x", args=[], directory="d", job="job", node=run.host.name, board="",
                nproc=1, preload=[], run_id=run.name, identity=run.directory.identity(),
                rendezvous=rendezvous, terms=settings.terms,
            )  # fmt: skip
            self.membership = Membership(
                spec, rendezvous, self.workers, self.send, run.world.network.of(self),
                run.host.clock.monotonic,
            )  # fmt: skip
        run.host.after(self.kernel.between(0.2, 2.0), self._ready)

    def _ready(self) -> None:
        if not self.is_dead:
            self.send(Ready())
            self._tick()

    def _tick(self) -> None:
        """The loop's own turns: seldom, and often enough while a link is down."""
        if self.is_dead or self.membership is None:
            return
        self.turn()
        alert = self.kernel.now < self._alert_until
        self.run.host.after(0.6 if alert else 4.0, self._tick)

    def be_alert(self) -> None:
        """A link has changed: turn as often as the real loop must to find out."""
        if self.membership is not None and self._alert_until < self.kernel.now:
            self._alert_until = self.kernel.now + 6.0
            self.run.host.after(0.0, self._tick)

    def changed(self) -> None:
        """There is something to look at: turn soon, once."""
        if not self._turn_is_due and not self.is_dead and self.membership is not None:
            self._turn_is_due = True
            self.run.host.after(self.kernel.between(0.0, TURN_SECONDS), self._woken)

    def _woken(self) -> None:
        self._turn_is_due = False
        self.turn()

    def turn(self) -> None:
        if self.is_dead or self.membership is None:
            return
        try:
            self.membership.serve()
        except SystemExit:  # the head's store has failed
            self.die()

    def obey(self, command: Command) -> None:
        if self.is_dead:
            return
        if self.membership is not None:
            self.membership.obey(command)
        elif isinstance(command, Launch):
            self.workers.begin(NodeRank(command.incarnation, 0, 1, "", 0))
        elif isinstance(command, Ask):
            self._ask(command.kind)
        if isinstance(command, Kill):
            self.workers.kill()
        self.turn()

    def _ask(self, kind: RequestKind) -> None:
        """As ``Agent._ask``."""
        workers = self.workers
        if not workers.busy:
            return
        if kind is not RequestKind.STOP and workers.seen < workers.flagged:
            return
        number = workers.flagged + 1
        answer = workers.flag(number)
        idle = kind is RequestKind.STOP and not answer.started
        assert answer.step >= 0 or answer.step == NOTHING_ENTERED
        workers.post(RequestAnswer(number, kind, answer.step), idle=idle)

    def ended(self, verdict: Ended) -> None:
        """The workers are gone."""
        if self.membership is None:
            self.send(verdict)
        else:
            self.membership.ended(verdict)
            self.changed()

    def send(self, event: AgentEvent) -> None:
        self.handle.said.append(event)
        self.run.wake(self.kernel.between(0.0005, 0.01))

    def die(self) -> None:
        """SIGKILL, or its supervisor's end: it takes the workers with it."""
        if self.is_dead:
            return
        self.is_dead = True
        self.workers.kill()
        self.run.world.network.changed()
        self.run.wake(0.001)
