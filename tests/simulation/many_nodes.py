"""A head with thousands of members in virtual time, as far as one process can go.

Real are the head's side of all connections (``Hub``), its membership and rules (``Membership``,
``HeadRules``), what its supervisor decides by them (``HeadRole``, ``Gathering``), and every line
that is sent. Pretended are the sockets, the members' agents, all workers, and the rest of the
head's supervisor, which has a simulation of its own (``run.py``).

``python -m tests.simulation.many_nodes MEMBERS [SEED]`` prints what it costs the head.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

from elastic_ckpt.protocol.agreement import RequestKind
from elastic_ckpt.protocol.cluster import (
    BEAT_SECONDS,
    GATHER_SECONDS,
    LOST_SECONDS,
    JobState,
    MemberState,
    NodeAnswer,
)
from elastic_ckpt.protocol.ended import Ended
from elastic_ckpt.protocol.hub_lines import BEAT, HeadLine, decode_job
from elastic_ckpt.protocol.messages import AgentEvent, Ask, Launch, Launched
from elastic_ckpt.protocol.rendezvous import Rendezvous
from elastic_ckpt.protocol.worker_spec import WorkerSpec
from elastic_ckpt.supervisor.agent import hub
from elastic_ckpt.supervisor.agent.cluster_member import Membership
from elastic_ckpt.supervisor.cluster.head import HeadRole
from tests.simulation.kernel import Kernel, Violation
from tests.simulation.many_links import Bell, Line, Listener, Selector
from tests.simulation.many_members import Member, Workers

TURN_SECONDS = 0.001
"""Within this time the hub's thread turns once something has arrived."""

NOTICED_SECONDS = 0.6
"""The most that the head may take to act on what it could have seen: two turns of its agent's loop,
and what it waits between two looks at 10,000 members."""

SETTLED_SECONDS = 14.0
"""After this the job has changed its nodes, gathered, and launched."""


@dataclass
class Cost:
    """CPU seconds of the head by what it did, and for how many members and seconds."""

    hub: float = 0.0
    agent: float = 0.0
    supervisor: float = 0.0
    member_seconds: float = 0.0
    at: float = field(default_factory=time.process_time)

    @property
    def milliseconds(self) -> float:
        """Of CPU, per member and second."""
        return 1e3 * (self.hub + self.agent + self.supervisor) / max(1.0, self.member_seconds)


class ManyNodes:
    """One job of many nodes.

    Attributes:
        step: the step that the ranks are in.
        log: what the head's supervisor says.
    """

    def __init__(self, seed: int, nodes: tuple[int, int]) -> None:
        self.kernel = Kernel(seed)
        self.step = 1
        self.listener = Listener(self)
        self.members: list[Member] = []
        self.lost_at: dict[int, float] = {}
        self.struck: dict[int, tuple[float, float]] = {}  # when the head may, and must, know
        self.latencies: list[float] = []
        self.cost = Cost()
        self.log: list[str] = []
        self.launches = 0
        self.hub: hub.Hub | None = None
        self._events: deque[AgentEvent] = deque()
        self.selector = Selector()
        self._rung = self._woken = False
        self._ticks = 0
        self._running = False
        self._asked_at: dict[tuple[int, int], float] = {}
        self._entered: dict[tuple[int, int], int] = {}
        self._learned: dict[tuple[int, int], int] = {}
        self._known: dict[bytes, HeadLine] = {}
        self._rosters: dict[tuple[int, ...], frozenset[int]] = {}
        self._role = HeadRole(nodes)
        self._run: Any = self._supervisor(nodes)
        place = Rendezvous("head", 1, 3)
        spec = WorkerSpec(
            script="x", args=[], directory="d", job="job", node="head", board="", nproc=1,
            preload=[], run_id="r", identity="i", rendezvous=place,
        )  # fmt: skip
        self.membership = Membership(
            spec, place, Workers(self), self._events.append, self._network(), self._clock
        )

    @property
    def state(self) -> JobState:
        """The job's state, as the head has published it."""
        assert self.hub is not None
        return self.hub.job

    def _clock(self) -> float:
        return self.kernel.now + 1_000.0

    def _network(self) -> Any:
        world = self

        class Network:
            def host_workers(self, address: str) -> Any:
                return SimpleNamespace(port=1)

            def connect(self, place: Rendezvous, mine: MemberState, job: JobState | None) -> Any:
                assert job is not None
                world.hub = hub.Hub(world.listener, mine, job, world.wake, world._clock)
                return world.hub

        return Network()

    # -- the head's supervisor ----------------------------------------------------------------

    def _supervisor(self, nodes: tuple[int, int]) -> Any:
        """What its role needs of it."""
        run = SimpleNamespace(now=0.0, agent=SimpleNamespace(send=self._obey), goes_on=None)
        run.record = SimpleNamespace(say=self.log.append, update=lambda **_: None)
        journal = SimpleNamespace(write=lambda event: None)
        run.ports = SimpleNamespace(journal=journal, board=SimpleNamespace())
        run.saves = SimpleNamespace(hand_over_seconds=lambda nodes, grace: 0.0)
        run.settings = SimpleNamespace(node="head", gather_seconds=600.0, grace=60.0)
        run.serve_saves = lambda now: None
        run.incarnations = SimpleNamespace(
            may_launch=True, clean_up=lambda: True, launch=self._launch
        )
        return run

    def _launch(self, nodes: int, without: tuple[str, ...]) -> None:
        self.launches += 1
        self._running = True
        self._obey(Launch(self.launches, nodes, without=without))

    def _obey(self, command: Any) -> None:
        self.membership.obey(command)
        self.wake()

    def ask(self) -> None:
        """A save of the interval is due."""
        self._obey(Ask(RequestKind.SAVE))

    def _turn_supervisor(self) -> None:
        now, self._run.now = self._clock(), self._clock()
        while self._events:
            event = self._events.popleft()
            if isinstance(event, Ended):
                self._running = False
                self._role.on_ended(self._run)
            elif not isinstance(event, Launched):
                self._role.on_event(self._run, event)
        if self._running:
            self._role.serve_running(self._run, now)
        else:
            self._role.serve_start(self._run, now)

    # -- the head's agent -----------------------------------------------------------------------

    def ring(self, ready: Any) -> None:
        """Something is there for the hub's thread."""
        self.selector.ready[id(ready)] = ready
        if not self._rung:
            self._rung = True
            self.kernel.after(self.kernel.between(0.0, TURN_SECONDS), self._turn_hub)

    def wake(self) -> None:
        """Something is there for the agent's main thread."""
        if not self._woken:
            self._woken = True
            self.kernel.after(self.kernel.between(0.0, TURN_SECONDS), self._turn_agent)

    def end_head(self, verdict: Ended) -> None:
        """The head's own workers end."""
        self.kernel.after(0.1, lambda: (self.membership.ended(verdict), self.wake())[1])

    def _turn_hub(self) -> None:
        self._rung = False
        assert self.hub is not None
        with self._charged("hub"):
            self.hub.turn()

    def _turn_agent(self) -> None:
        self._woken = False
        with self._charged("agent"):
            self.membership.serve()
        self._look()
        with self._charged("supervisor"):
            self._turn_supervisor()

    def _tick(self) -> None:
        """The turns that nothing wakes: of the hub for beats and silence, of the agent's loop."""
        self.kernel.after(0.05, self._tick)
        if not self._rung:
            self._turn_hub()
        self._ticks += 1
        if self._ticks % 5 == 0 and not self._woken:
            self._turn_agent()

    @contextmanager
    def _charged(self, what: str) -> Iterator[None]:
        began = time.process_time()
        yield
        taken = time.process_time() - began
        setattr(self.cost, what, getattr(self.cost, what) + taken)

    # -- the network ----------------------------------------------------------------------------

    def carry_to(self, member: Member, line: Line, data: bytes) -> None:
        """Bring a line of the head's to a member."""
        if member.is_gone or member.line is not line or member.silent_until == float("inf"):
            return
        if data == BEAT and self.kernel.now >= member.silent_until:
            member.hear(None)  # at once: thousands a second, and nothing depends on the moment
            return
        found = None if data == BEAT else self._decoded(data)
        member.told_by = max(member.told_by, self.kernel.now + member.link_seconds())
        self.kernel.after(member.told_by - self.kernel.now, lambda: member.hear(found))

    def _decoded(self, data: bytes) -> HeadLine:
        """All members get the same line, but for the first."""
        if data not in self._known:
            if len(self._known) > 8:
                self._known.clear()
            self._known[data] = decode_job(data[:-1])
        return self._known[data]

    def members_of(self, numbers: tuple[int, ...]) -> frozenset[int]:
        """A roster to look up numbers in."""
        if numbers not in self._rosters:
            self._rosters = {numbers: frozenset(numbers)}
        return self._rosters[numbers]

    # -- what must hold -------------------------------------------------------------------------

    def _look(self) -> None:
        state, now = self.state, self.kernel.now
        for number in state.lost - self.lost_at.keys():
            self.lost_at[number] = now
            if number not in self.struck:
                raise Violation(f"member {number} is given up, and is well")
            earliest, latest = self.struck[number]
            if not earliest <= now <= latest:
                due = f"{earliest:.2f} to {latest:.2f}"
                raise Violation(f"member {number} is given up at {now:.2f}, not in {due}")
        for number, (_, latest) in self.struck.items():
            if now > latest and number not in self.lost_at:
                raise Violation(f"member {number} is lost since {latest:.2f}, and not given up")
        for request in state.requests:
            self._asked_at.setdefault((state.incarnation, request.number), now)

    def entered(self, incarnation: int, number: int) -> NodeAnswer:
        """Return which step the ranks of a node have entered, when they see a request."""
        step, request = self.step + self.kernel.random.randrange(2), (incarnation, number)
        self._entered[request] = max(step, self._entered.get(request, 0))
        return NodeAnswer(step, started=True)

    def learned(self, incarnation: int, number: int, step: int) -> None:
        """A node knows the answer to a request."""
        request = incarnation, number
        if step != self._entered[request]:
            raise Violation(
                f"request {number} is answered with {step}, a node is at {self._entered[request]}"
            )
        self._learned[request] = self._learned.get(request, 0) + 1
        if self._learned[request] == len(self.state.roster):
            self.latencies.append(self.kernel.now - self._asked_at[request])

    def expect(self, launches: int) -> None:
        """The job runs, once launched anew for each batch of changes, on exactly who is there."""
        state = self.state
        there = [0, *sorted(one.number for one in self.members if one.is_there)]
        if self.launches != launches or state.incarnation != launches or state.is_over:
            raise Violation(f"incarnation {self.launches} runs, instead of {launches}")
        if list(state.roster) != there:
            wrong = set(state.roster) ^ set(there)
            raise Violation(f"the roster differs from who is there by {sorted(wrong)[:5]}")
        ready = sum(one.state.incarnation == launches for one in self.members if one.is_there)
        if ready != len(there) - 1:
            raise Violation(f"{ready} members have begun incarnation {launches}")

    # -- a run ----------------------------------------------------------------------------------

    def begin(self) -> None:
        """The head's agent starts."""
        self.membership.serve()
        self.kernel.after(0.05, self._tick)

    def go(self, seconds: float) -> None:
        """Let time pass."""
        until, now = self.kernel.now + seconds, self.kernel.now
        self.kernel.run(until, lambda: False)
        self.kernel.now = until
        self.cost.member_seconds += (until - now) * sum(not one.is_gone for one in self.members)

    def join(self, count: int, seconds: float) -> None:
        """So many connect, over some time."""
        for number in range(count):
            one = Member(self, f"node{len(self.members):05d}")
            self.members.append(one)
            self.kernel.after(seconds * number / count, one.connect)

    def strike(self, one: Member, *, silent: bool) -> None:
        """Take a member: its connection closes, or its link is cut."""
        now = self.kernel.now
        if silent:
            one.fall_silent()
            earliest = now + LOST_SECONDS - BEAT_SECONDS - 0.01
            self.struck[one.number] = earliest, now + LOST_SECONDS + NOTICED_SECONDS
        else:
            one.vanish()
            self.struck[one.number] = now, now + NOTICED_SECONDS

    def choose(self, count: int) -> list[Member]:
        """Draw members that are well."""
        return self.kernel.random.sample([one for one in self.members if one.is_there], count)


@contextmanager
def pretended_sockets(world: ManyNodes) -> Iterator[None]:
    """Have the hub use the world's connections."""
    selectors = SimpleNamespace(DefaultSelector=lambda: world.selector, EVENT_READ=1, EVENT_WRITE=2)
    with (
        mock.patch.object(hub, "LineSocket", lambda accepted: accepted),
        mock.patch.object(hub, "Waker", lambda: Bell(world)),
        mock.patch.object(hub, "selectors", selectors),
    ):
        yield


def live(members: int, seed: int, say: Callable[[str], None] = lambda line: None) -> ManyNodes:
    """Live through a job; Violation if something does not hold."""
    world = ManyNodes(seed, (max(2, members // 2), members + 1))
    share = max(3, members // 500)
    with pretended_sockets(world):
        world.begin()
        world.join(members - share, seconds=members / 1_000)
        world.go(members / 1_000 + GATHER_SECONDS + 4.0)
        world.expect(1)
        say("joined")
        _save(world)
        for one in world.choose(share):
            world.strike(one, silent=False)
        world.go(SETTLED_SECONDS)
        world.expect(2)
        say("some vanished")
        for one in world.choose(share):
            world.strike(one, silent=True)
        for one in world.choose(5 * share):
            one.fall_silent(LOST_SECONDS - BEAT_SECONDS - 0.1)  # and is back: no loss
        world.go(SETTLED_SECONDS)
        world.expect(3)
        say("some fell silent, more for a moment")
        for one in world.choose(share):
            one.get_notice()
        world.go(SETTLED_SECONDS)
        world.expect(4)
        say("some were preempted")
        world.join(share, seconds=0.5)
        world.go(SETTLED_SECONDS)
        world.expect(5)
        say("some joined")
        _save(world)
        if len(world.lost_at) != len(world.struck):
            raise Violation(f"{len(world.struck)} were struck, {len(world.lost_at)} given up")
    return world


def _save(world: ManyNodes) -> None:
    """All nodes agree on a step, three times."""
    for _ in range(3):
        before = len(world.latencies)
        world.ask()
        world.go(1.0)
        world.step += 1
        if len(world.latencies) != before + 1:
            raise Violation("a save was not agreed on within a second")


def main() -> None:
    members = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    began = time.process_time()

    def say(line: str) -> None:
        print(f"  {time.process_time() - began:6.1f} s of CPU: {line}", flush=True)

    world = live(members, seed, say)
    cost = world.cost
    print(
        f"{members:,} members, {world.kernel.now:.0f} virtual seconds: {len(world.struck)} losses, "
        f"{world.launches} incarnations, {len(world.latencies)} agreements"
    )
    print(
        f"the head: {cost.milliseconds:.4f} ms of CPU per member and second; hub {cost.hub:.1f} s, "
        f"membership and rules {cost.agent:.1f} s, supervisor's role {cost.supervisor:.1f} s; "
        f"{time.process_time() - began:.1f} s with what is pretended"
    )


if __name__ == "__main__":
    main()
