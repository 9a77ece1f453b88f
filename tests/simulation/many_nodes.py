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

from elastic_ckpt.protocol.agreement import RequestAnswer, RequestKind
from elastic_ckpt.protocol.cluster import (
    BEAT_SECONDS,
    GATHER_SECONDS,
    LOST_SECONDS,
    JobState,
    MemberState,
    NodeAnswer,
)
from elastic_ckpt.protocol.ended import Ended, EndKind
from elastic_ckpt.protocol.hub_lines import BEAT, HeadLine, decode_job, encode_member
from elastic_ckpt.protocol.messages import AgentEvent, Ask, Launch, Launched
from elastic_ckpt.protocol.rendezvous import Rendezvous
from elastic_ckpt.protocol.worker_spec import WorkerSpec
from elastic_ckpt.supervisor.agent import hub
from elastic_ckpt.supervisor.agent.cluster_member import Membership
from elastic_ckpt.supervisor.agent.launch import NodeRank
from elastic_ckpt.supervisor.cluster.head import HeadRole
from tests.simulation.kernel import Kernel, Violation

LINK_SECONDS = (0.0001, 0.002)
"""How long a line is on its way."""

RETRANSMITTED = (0.2, 0.6, 1.4, 3.0)
"""When TCP sends again what was lost, after the first time."""

TURN_SECONDS = 0.001
"""Within this time the hub's thread turns once something has arrived."""

NOTICED_SECONDS = 0.6
"""The most that the head may take to act on what it could have seen: two turns of its agent's loop,
and what it waits between two looks at 10,000 members."""

SETTLED_SECONDS = 14.0
"""After this the job has changed its nodes, gathered, and launched."""


class Line:
    """The head's end of a connection (``LineSocket``)."""

    def __init__(self, world: ManyNodes, member: Member) -> None:
        self.lost = ""
        self.unsent = b""
        self.arrived: list[bytes] = []
        self._world = world
        self._member = member

    def receive(self) -> list[bytes]:
        lines, self.arrived = self.arrived, []
        return lines

    def send(self, data: bytes) -> None:
        self._world.carry_to(self._member, self, data)

    def flush(self) -> None:
        return

    def close(self) -> None:
        self._member.closed(self)

    def deliver(self, line: bytes) -> None:
        self.arrived.append(line)
        self._world.ring(self)


class Selector:
    """What is ready at this moment; never waits."""

    def __init__(self) -> None:
        self.keys: dict[int, SimpleNamespace] = {}
        self.ready: dict[int, Any] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> None:
        self.keys[id(fileobj)] = SimpleNamespace(fileobj=fileobj, data=data)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> None:
        self.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> None:
        del self.keys[id(fileobj)]

    def select(self, timeout: float) -> list[tuple[SimpleNamespace, int]]:
        ready, self.ready = self.ready, {}
        return [(self.keys[number], 1) for number in ready if number in self.keys]


class Bell:
    """Wakes the hub's thread (``Waker``)."""

    def __init__(self, world: ManyNodes) -> None:
        self._world = world

    def wake(self) -> None:
        self._world.ring(self)

    def clear(self) -> None:
        return


class Listener:
    """Where members connect."""

    def __init__(self, world: ManyNodes) -> None:
        self.waiting: deque[Line] = deque()
        self._world = world

    def setblocking(self, flag: bool) -> None:
        return

    def accept(self) -> tuple[Line, str]:
        if not self.waiting:
            raise BlockingIOError
        if len(self.waiting) > hub.ACCEPT_AT_ONCE:
            self._world.ring(self)
        return self.waiting.popleft(), ""


class Workers:
    """The head's own part in an incarnation (``LocalWorkers``)."""

    busy = False
    is_warm = True
    answered = flagged = seen = 0

    def __init__(self, world: ManyNodes) -> None:
        self._world = world
        self._incarnation = 0

    def begin(self, node_rank: NodeRank) -> None:
        self.busy, self.answered, self.flagged, self.seen = True, 0, 0, 0
        self._incarnation = node_rank.number

    def flag(self, number: int) -> NodeAnswer:
        self.flagged = number
        return self._world.entered(self._incarnation, number)

    def post(self, answer: RequestAnswer, *, idle: bool) -> None:
        self.answered = self.seen = answer.number
        self._world.learned(self._incarnation, answer.number, answer.step)
        if answer.kind is RequestKind.STOP:
            self._end(EndKind.STOPPED)

    def cut_short(self) -> None:
        self._end(EndKind.CUT_SHORT)

    def _end(self, kind: EndKind) -> None:
        if self.busy:
            self.busy = False
            self._world.end_head(Ended(incarnation=self._incarnation, kind=kind))


class Member:
    """A node that is not the head: its agent in a few lines, as ``benchmarks/hub.py`` has them."""

    def __init__(self, world: ManyNodes, name: str) -> None:
        self.world = world
        self.state = MemberState(node=name)
        self.line: Line | None = None
        self.number = -1
        self.is_gone = False  # vanished, or left
        self.silent_until = 0.0
        self._roster: frozenset[int] = frozenset()
        self._heard_at = self._sent_by = 0.0
        self.told_by = 0.0

    @property
    def is_there(self) -> bool:
        """Whether it is to be in the next incarnation."""
        return not self.is_gone and not self.state.leaving and self.silent_until < float("inf")

    def connect(self) -> None:
        self._heard_at = self.world.kernel.now
        self.line = Line(self.world, self)
        self.world.listener.waiting.append(self.line)
        self.world.ring(self.world.listener)
        self.say()
        self.world.kernel.after(self.world.kernel.between(0.0, BEAT_SECONDS), self._beat)

    def say(self) -> None:
        self._send(encode_member(self.state)[:-1])

    def _send(self, line: bytes) -> None:
        end, kernel = self.line, self.world.kernel
        if self.is_gone or end is None or self.silent_until == float("inf"):
            return
        self._sent_by = max(self._sent_by, kernel.now + self.link_seconds())
        kernel.after(self._sent_by - kernel.now, lambda: end.deliver(line))

    def link_seconds(self) -> float:
        """How long a line takes; what is lost on a link that is cut TCP sends again."""
        kernel = self.world.kernel
        again = (0.0, *RETRANSMITTED)
        waits = next(one for one in again if kernel.now + one >= self.silent_until)
        return waits + kernel.between(*LINK_SECONDS)

    def _beat(self) -> None:
        kernel = self.world.kernel
        if self.is_gone or self.silent_until == float("inf"):
            return
        if kernel.now >= self.silent_until and kernel.now - self._heard_at > LOST_SECONDS:
            raise Violation(f"{self.state.node} has not heard the head for {LOST_SECONDS} s")
        self._send(b"")
        kernel.after(BEAT_SECONDS, self._beat)

    def hear(self, found: HeadLine | None) -> None:
        """A line of the head's arrives; None is a beat."""
        self._heard_at = self.world.kernel.now
        if found is None or found.job is None or self.is_gone:
            return
        if found.number >= 0:
            self.number = found.number
        if found.roster is not None:
            self._roster = self.world.members_of(found.roster.numbers)
        self._follow(found.job)

    def _follow(self, job: JobState) -> None:
        mine, changed = self.state, False
        if mine.incarnation != job.incarnation:
            if self.number not in self._roster or mine.leaving:
                return
            mine.incarnation, mine.answers, mine.ended, mine.seen = job.incarnation, {}, None, 0
            changed = True
        for request in job.requests:
            if request.number not in mine.answers:
                entered = self.world.entered(mine.incarnation, request.number)
                mine.answers = {request.number: entered}
                changed = True
            if request.step is not None and mine.seen < request.number:
                mine.seen, changed = request.number, True
                self.world.learned(mine.incarnation, request.number, request.step)
                if request.kind is RequestKind.STOP:
                    self._end(EndKind.STOPPED)
        if job.over:
            self._end(EndKind.CUT_SHORT)
        if changed:
            self.world.kernel.after(0.001, self.say)

    def _end(self, kind: EndKind) -> None:
        """All ranks of this node are gone some moments later."""
        number = self.state.incarnation

        def ended() -> None:
            if self.state.ended is None and self.state.incarnation == number:
                self.state.ended = Ended(incarnation=number, kind=kind)
                self.say()

        if self.state.ended is None:
            self.world.kernel.after(self.world.kernel.between(0.01, 0.3), ended)

    # -- what happens to it -----------------------------------------------------------------------

    def vanish(self) -> None:
        """Its machine is killed, and the kernel closes the connection."""
        self.is_gone = True
        if self.line is not None:
            self.line.lost = "the other end has closed the connection"
            self.world.ring(self.line)

    def fall_silent(self, seconds: float = float("inf")) -> None:
        """Its link is cut, for some time."""
        self.silent_until = self.world.kernel.now + seconds

    def get_notice(self) -> None:
        """It saves with all others, and is not in the next incarnation."""
        self.state.leaving = True
        self.state.asks = {1: RequestKind.STOP}
        self.say()

    def closed(self, line: Line) -> None:
        """The head has closed the connection."""
        if self.line is line and not self.is_gone and self.silent_until < float("inf"):
            raise Violation(f"{self.state.node} is there, and the head has closed its connection")


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
        run.ports = SimpleNamespace(journal=SimpleNamespace(write=lambda event: None))
        run.settings = SimpleNamespace(node="head", gather_seconds=600.0)
        run.serve_saves = lambda now: None
        run.incarnations = SimpleNamespace(
            may_launch=True, clean_up=lambda: True, launch=self._launch
        )
        return run

    def _launch(self, nodes: int) -> None:
        self.launches += 1
        self._running = True
        self._obey(Launch(self.launches, nodes))

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
