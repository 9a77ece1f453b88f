"""The job's store as the agents see it: reports that arrive later, in order, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from elastic_ckpt.protocol.cluster import JobState, MemberState, Seen
from elastic_ckpt.protocol.rendezvous import Rendezvous

if TYPE_CHECKING:
    from tests.simulation.agents import SimAgent
    from tests.simulation.hosts import Host
    from tests.simulation.world import World

STORE_SECONDS = 2.0
"""After which a call of the store that is not answered fails."""


class SimStore:
    """What the head's agent hosts; it goes with that agent."""

    def __init__(self, agent: SimAgent) -> None:
        self.agent = agent
        self.job: JobState | None = None
        self.links: dict[int, SimLink] = {}
        self.states: dict[int, MemberState] = {}
        self.last_heard: dict[int, float] = {}


class SimLink:
    """One agent's connection (``Link``)."""

    def __init__(
        self, network: SimNetwork, agent: SimAgent, mine: MemberState, job: JobState | None
    ) -> None:
        self.number = -1
        self.job: JobState | None = None
        self.broken = ""
        self.store: SimStore | None = None
        self.cut_at: float | None = None
        self._network = network
        self._agent = agent
        self._kernel = network.world.kernel
        self._leads = job is not None
        self._closed = False
        self._waiting: list[Callable[[], None]] = []
        self._said: tuple[bytes, bytes] | None = None
        self._first = (mine, job)
        self._kernel.after(0.0 if self._leads else self._delay(), self._dial)

    # -- Link -----------------------------------------------------------------------------------

    @property
    def heard_at(self) -> float:
        clock = self._agent.run.host.clock
        return clock.monotonic() if self.cut_at is None else self.cut_at + clock.offset

    @property
    def heard(self) -> tuple[dict[int, Seen], float]:
        """On the head: what each member says, and when it was heard last."""
        store, clock = self.store, self._agent.run.host.clock
        now = clock.monotonic()
        if store is None:
            return {}, now
        found = {}
        for number, state in store.states.items():
            link = store.links[number]
            silent_since = link.silent_since
            at = now if silent_since is None else silent_since + clock.offset
            found[number] = Seen(state, at)
        return found, now

    @property
    def silent_since(self) -> float | None:
        if self._closed or self.broken or self._agent.is_dead:
            self.cut_at = self.cut_at if self.cut_at is not None else self._kernel.now
        return self.cut_at

    def say(self, mine: MemberState, job: JobState | None) -> None:
        if self.number < 0 or self._closed:
            return
        words = msgspec.json.encode(mine), msgspec.json.encode(job)
        if words == self._said:
            return
        before, self._said = self._said, words
        if before is None or words[0] != before[0]:
            self._send(lambda: self._deliver_mine(words[0]))
        if self._leads and (before is None or words[1] != before[1]):
            self._publish(words[1])

    def close(self) -> None:
        self._closed = True
        self._fall_silent()

    # -- inside ---------------------------------------------------------------------------------

    def _delay(self) -> float:
        kernel = self._kernel
        return kernel.between(0.05, 0.6) if kernel.chance(0.03) else kernel.between(0.001, 0.06)

    def _dial(self) -> None:
        if self._closed or self._agent.is_dead:
            return
        if self._leads:
            self._agent.store = SimStore(self._agent)
        head = self._network.head_of(self._agent)
        if head is None or head.store is None or not self._network.is_up(self._agent):
            self._break("no answer")
            return
        store = head.store
        if store.job is None and not self._leads:
            self._kernel.after(0.05, self._dial)
            return
        self.store, self._agent.head = store, head.run
        self.number = len(store.links)
        store.links[self.number] = self
        mine, job = self._first
        store.states[self.number] = msgspec.json.decode(msgspec.json.encode(mine), type=MemberState)
        if job is not None:
            store.job = msgspec.json.decode(msgspec.json.encode(job), type=JobState)
        self.job = store.job
        self._agent.changed()
        head.changed()

    def _send(self, deliver: Callable[[], None]) -> None:
        """Deliver after a while, after all before it; hold back while the link is cut."""
        self._waiting.append(deliver)
        self._kernel.after(0.0 if self._leads else self._delay(), self._flush)

    def _flush(self) -> None:
        if self.broken or (self._agent.is_dead and not self._closed):
            return
        if not self._network.is_up(self._agent):
            return  # until it heals or breaks
        waiting, self._waiting = self._waiting, []
        for deliver in waiting:
            deliver()

    def _deliver_mine(self, data: bytes) -> None:
        store = self.store
        if store is None or store.agent.is_dead:
            return
        store.states[self.number] = msgspec.json.decode(data, type=MemberState)
        store.agent.changed()

    def _publish(self, data: bytes) -> None:
        store = self.store
        assert store is not None
        store.job = msgspec.json.decode(data, type=JobState)
        for link in store.links.values():
            link.receive(data)

    def receive(self, data: bytes) -> None:
        """The head has said something."""

        def deliver() -> None:
            self.job = msgspec.json.decode(data, type=JobState)
            self._agent.changed()

        if self._leads:
            self.job = msgspec.json.decode(data, type=JobState)
            return
        self._waiting.append(deliver)
        self._kernel.after(self._delay(), self._flush)

    def cut(self) -> None:
        """The other end does not answer any more; it may again."""
        self._fall_silent()
        began = self.cut_at

        def give_up() -> None:
            if self.cut_at == began and not self._closed:
                self._break("wait timeout")

        self._kernel.after(STORE_SECONDS + self._kernel.between(0.0, 0.5), give_up)

    def heal(self) -> None:
        if not self.broken and not self._closed:
            self.cut_at = None
            self._flush()

    def _fall_silent(self) -> None:
        if self.cut_at is None:
            self.cut_at = self._kernel.now

    def _break(self, why: str) -> None:
        self.broken = why
        self._fall_silent()
        if not self._agent.is_dead:
            self._agent.changed()


class _Workers:
    port = 1


class SimNetwork:
    """Joins the agents of all hosts (``Network``, one for each agent by :meth:`of`).

    Attributes:
        cuts: pairs of hosts that do not reach each other, by their numbers.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.cuts: set[frozenset[int]] = set()

    def of(self, agent: SimAgent) -> Any:
        network = self

        class OfAgent:
            def host_workers(self, address: str) -> Any:
                return _Workers()

            def connect(
                self, rendezvous: Rendezvous, mine: MemberState, job: JobState | None
            ) -> SimLink:
                link = SimLink(network, agent, mine, job)
                agent.link = link
                return link

        return OfAgent()

    def head_of(self, agent: SimAgent) -> SimAgent | None:
        """Return the agent that this one is connected to, or would be if it dialled now."""
        link = agent.link
        if link is not None and link.store is not None:
            head = link.store.agent
        elif agent.run.leads:
            head = agent
        else:
            there = agent.run.world.dialled(agent.run).run
            if there is None or there.agent is None:
                return None
            head = there.agent
        return None if head.is_dead or head.run.host.is_down else head

    def is_up(self, agent: SimAgent) -> bool:
        """Whether this agent reaches its head."""
        head = self.head_of(agent)
        return head is not None and self.reaches(agent.run.host, head.run.host)

    def reaches(self, one: Host, other: Host) -> bool:
        """Whether two hosts reach each other, and answer."""
        if one is other:
            return True
        for host in (one, other):
            if host.is_cut or host.is_down or host.is_paused:
                return False
        return not self.cuts or frozenset((one.number, other.number)) not in self.cuts

    def changed(self) -> None:
        """A link was cut or healed, or an end of it has gone: all agents learn in time."""
        for host in self.world.all_hosts:
            agent = host.run.agent if host.run else None
            if agent is None or agent.is_dead or agent.link is None:
                continue
            up = self.is_up(agent)
            if not up and agent.link.cut_at is None:
                agent.link.cut()
            elif up and agent.link.cut_at is not None:
                agent.link.heal()
            agent.be_alert()
