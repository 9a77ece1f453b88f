"""What the nodes of a job cost their head: CPU time a second, and how long they take to agree.

The head is a process of its own with the agent's real parts: the hub, the head's rules and its
membership, in the agent's loop; its workers are pretended. The members are sockets of this process,
which speak the real protocol: a beat a second each, and an answer to each request at once.
"""

from __future__ import annotations

import multiprocessing
import resource
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from harness import Report, goal, progress, read_options, summary

from elastic_ckpt.protocol.agreement import RequestAnswer, RequestKind
from elastic_ckpt.protocol.cluster import BEAT_SECONDS, MemberState, NodeAnswer
from elastic_ckpt.protocol.hub_lines import BEAT, decode_job, encode_member
from elastic_ckpt.protocol.messages import Ask, Launch
from elastic_ckpt.protocol.rendezvous import Rendezvous
from elastic_ckpt.protocol.worker_spec import WorkerSpec
from elastic_ckpt.supervisor.agent.cluster_member import Membership
from elastic_ckpt.supervisor.agent.hub import MAX_FILES
from elastic_ckpt.supervisor.agent.hub_link import HubNetwork
from elastic_ckpt.supervisor.agent.launch import NodeRank
from elastic_ckpt.supervisor.agent.line_socket import LineSocket, Waker

COUNTS = (2, 16, 128, 1000)
QUICK_COUNTS = (2, 16)
WINDOW_SECONDS = 10.0
QUICK_SECONDS = 1.0
LIMIT_SECONDS = 120.0
REQUESTS = 10
PAUSE_SECONDS = 0.3
AT_ONCE = 100
"""Members that connect together: the kernel keeps that many waiting, and refuses none."""

GOAL_MS = 1.0
SPARE_FILES = 200


class PretendedWorkers:
    """The head's own part in an incarnation (``LocalWorkers``)."""

    busy = False
    is_warm = True
    answered = flagged = seen = 0

    def begin(self, node_rank: NodeRank) -> None:
        self.busy, self.answered, self.flagged, self.seen = True, 0, 0, 0

    def flag(self, number: int) -> NodeAnswer:
        self.flagged = number
        return NodeAnswer(7, started=True)

    def post(self, answer: RequestAnswer, *, idle: bool) -> None:
        self.answered = self.seen = answer.number

    def cut_short(self) -> None:
        """End nothing."""


class Network(HubNetwork):
    """The real one, without a store for workers that are not there."""

    def host_workers(self, address: str) -> object:
        return SimpleNamespace(port=1)


def lead(pipe: Connection) -> None:
    """The head's agent, which the parent commands through the pipe; it reports its CPU seconds."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    place = Rendezvous("127.0.0.1", listener.getsockname()[1], listener.fileno())
    spec = WorkerSpec(
        script="x", args=[], directory="d", job="job", node="head", board="", nproc=1, preload=[],
        run_id="r", identity="i", rendezvous=place,
    )  # fmt: skip
    waker = Waker()
    nodes = Membership(
        spec, place, PretendedWorkers(), lambda event: None, Network(waker.wake), time.monotonic
    )
    selector = selectors.DefaultSelector()
    selector.register(pipe, selectors.EVENT_READ)
    selector.register(waker, selectors.EVENT_READ)
    pipe.send(place.port)
    while True:  # as Agent.run
        selector.select(nodes.patience())
        waker.clear()
        while pipe.poll():
            command = pipe.recv()
            if command is None:
                return
            if command == "cpu":
                pipe.send(time.process_time())
            else:
                nodes.obey(command)
        nodes.serve()


class Members:
    """The other nodes of a job, in this process."""

    def __init__(self, count: int, port: int) -> None:
        self.lines: list[LineSocket] = []
        self.states = [MemberState(node=f"node{number}") for number in range(count)]
        self.steps: dict[int, int] = {}  # by member: the newest request that it knows the answer of
        self.welcome = self.rosters = 0
        self._selector = selectors.DefaultSelector()
        self._beats: deque[tuple[float, LineSocket]] = deque()  # when each is due, the first first
        for number, state in enumerate(self.states):
            connection = socket.create_connection(("127.0.0.1", port), LIMIT_SECONDS)
            lines = LineSocket(connection)
            self.lines.append(lines)
            self._beats.append((time.monotonic() + BEAT_SECONDS, lines))
            self._selector.register(lines, selectors.EVENT_READ, number)
            lines.send(encode_member(state))
            if number % AT_ONCE == 0:
                self.serve(LIMIT_SECONDS, lambda n=number: self.welcome > n - AT_ONCE)

    def serve(self, seconds: float, done: Callable[[], bool] = lambda: False) -> None:
        """Beat and answer for this long, or until ``done``."""
        limit = time.monotonic() + seconds
        while not done():
            for key, _ in self._selector.select(max(0.0, min(0.01, limit - time.monotonic()))):
                self._beat()
                self._answer(key.data)
            self._beat()
            if time.monotonic() > limit:
                return

    def _beat(self) -> None:
        """Send the beats that are due, as one connection after the other was made."""
        now = time.monotonic()
        while now >= self._beats[0][0]:
            lines = self._beats.popleft()[1]
            lines.send(BEAT)
            self._beats.append((now + BEAT_SECONDS, lines))

    def _answer(self, member: int) -> None:
        for line in self.lines[member].receive():
            if line:
                self._follow(member, line)
        if self.lines[member].lost:
            raise RuntimeError(f"member {member} of {len(self.lines)}: {self.lines[member].lost}")

    def _follow(self, member: int, line: bytes) -> None:
        found = decode_job(line)
        self.welcome += found.number >= 0
        self.rosters += found.roster is not None
        job, state = found.job, self.states[member]
        assert job is not None
        changed = state.incarnation != job.incarnation
        state.incarnation = job.incarnation
        for request in job.requests:
            if request.number not in state.answers:
                state.answers = {request.number: NodeAnswer(7, started=True)}
                changed = True
            if request.step is not None and state.seen < request.number:
                state.seen = self.steps[member] = request.number
                changed = True
        if changed:
            self.lines[member].send(encode_member(state))

    def close(self) -> None:
        """Leave."""
        for lines in self.lines:
            lines.close()


def measure(
    count: int, seconds: float, requests: int, pause: float = PAUSE_SECONDS
) -> tuple[float, list[float], float]:
    """The head's CPU milliseconds per member and second without an event; the milliseconds of each
    agreement; its CPU milliseconds per member and agreement. After each there is a ``pause``, as
    the head takes no request until all have seen the one before."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    head = context.Process(target=lead, args=(theirs,), daemon=True)
    head.start()
    try:
        members = Members(count, receive(pipe))
        members.serve(2.0)
        pipe.send(Launch(1, nodes=count + 1))
        members.serve(LIMIT_SECONDS, lambda: all(one.incarnation for one in members.states))
        assert all(one.incarnation for one in members.states), "the members were not all launched"
        members.serve(1.0)
        before = cpu(pipe)
        began = time.monotonic()
        members.serve(seconds)
        idle = (cpu(pipe) - before) / (time.monotonic() - began) / count
        took, before = [], cpu(pipe)
        for number in range(1, requests + 1):
            began = time.monotonic()
            pipe.send(Ask(RequestKind.SAVE))
            members.serve(LIMIT_SECONDS, lambda n=number: _all_at(members, n))
            assert _all_at(members, number), f"request {number} was not answered"
            took.append(1e3 * (time.monotonic() - began))
            members.serve(pause)
        asked = (cpu(pipe) - before) / requests / count
        assert members.rosters == count, "a roster is sent once"
        members.close()
        pipe.send(None)
        head.join(10)
    finally:
        head.kill()
        head.join(10)
    return 1e3 * idle, took, 1e3 * asked


def _all_at(members: Members, number: int) -> bool:
    steps = members.steps
    return len(steps) == len(members.states) and min(steps.values()) >= number


def cpu(pipe: Connection) -> float:
    """CPU seconds that the head has used so far."""
    pipe.send("cpu")
    return float(receive(pipe))


def receive(pipe: Connection) -> Any:
    """What the head answers, within a bound."""
    if not pipe.poll(LIMIT_SECONDS):
        raise RuntimeError(f"the head has not answered for {LIMIT_SECONDS:.0f} s")
    return pipe.recv()


def main() -> None:
    """Measure each number of members, and print the table."""
    options = read_options(__doc__, repeats=3)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(hard, MAX_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    counts = QUICK_COUNTS if options.quick else COUNTS
    seconds = QUICK_SECONDS if options.quick else WINDOW_SECONDS
    report = Report("hub", "What members cost the head", {"counts": counts, "window": seconds})
    for count in counts:
        if count > files - SPARE_FILES:
            report.notes.append(f"not with {count} members: a process may open {files} files")
            continue
        idles, agreements, shares = [], [], []
        for turn in range(options.repeats):
            progress(f"{count} members, pass {turn + 1} of {options.repeats}")
            idle, took, asked = measure(count, seconds, 2 if options.quick else REQUESTS)
            idles.append(idle)
            agreements += took
            shares.append(asked)
        nodes = {"nodes per core": [1e3 / idle for idle in idles]}
        what = "CPU of the head per member and second, members"
        report.rows.append(summary(f"{what}: {count}", idles, unit="ms", more=nodes))
        report.goals.append(goal(f"{what}: {count}", idles, GOAL_MS, " ms"))
        more = {"CPU ms per member": shares}
        what = f"an agreement, members: {count}"
        report.rows.append(summary(what, agreements, unit="ms", more=more))
    report.show(options)


if __name__ == "__main__":
    main()
