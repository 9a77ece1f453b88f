"""How long N nodes take to agree on a step: predicted from measured costs, beside what is measured.

The prediction is a queue with one server, the head's process (its hub and its main thread share one
interpreter, so one core):

1. it sends the request to one member after the other (``send`` each);
2. a member answers a round trip and 1 ms later (the pause of its watcher), and the answers are read
   one after the other (``read`` each); meanwhile the main thread looks at all members (``look``
   each), as often as the hub lets it, and slows the reading by that;
3. after the last answer it waits for the next look, and looks;
4. it sends the answer to one member after the other; the last one has it half a round trip later.

*predicted* is for members on machines of their own. ``benchmarks/hub.py`` measures members that
share one process, and this machine's cores with the head; *same process* predicts that: a second
server, which takes and answers each line (``member`` each). On a machine that has other work a
duration is longer by that; so what is compared is the head's CPU for one agreement.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from harness import Report, Row, goal, progress, read_options, summary
from hub import LIMIT_SECONDS, measure

from elastic_ckpt.protocol.agreement import RequestKind
from elastic_ckpt.protocol.cluster import (
    HeadRules,
    JobState,
    MemberState,
    NodeAnswer,
    Request,
    Seen,
)
from elastic_ckpt.protocol.hub_lines import decode_job, encode_job, encode_member
from elastic_ckpt.supervisor.agent.hub import WAKE_SECONDS, Hub
from elastic_ckpt.supervisor.agent.line_socket import LineSocket

COUNTS = (100, 1_000, 10_000)
MEASURED, QUICK_MEASURED = (128, 1_000), (16,)
ROUND_TRIPS = (0.0001, 0.001)
FLAG_SECONDS = 0.001
PAUSE_SECONDS = 3.0
"""After each agreement that is measured: a busy machine needs that for a thousand members."""

TIMES, QUICK_TIMES = 50, 3
CONNECTIONS = 200
WITHIN = 3.0
"""A prediction that is off by more than this, either way, explains nothing."""


@dataclass(frozen=True)
class Costs:
    """Seconds of CPU for each member."""

    send: float
    read: float
    look: float
    member: float


def predict(count: int, round_trip: float, costs: Costs, *, one_process: bool = False) -> float:
    """Seconds from a request until the last of ``count`` members knows the agreed step.

    Args:
        one_process: the members share a process, which takes one line after the other.
    """
    arrived = server = 0.0  # when the member's process, and the head, are done with the last one
    reading = costs.read * (1 + costs.look / WAKE_SECONDS)
    server = count * costs.send
    for number in range(1, count + 1):
        heard = number * costs.send + round_trip / 2
        arrived = (max(arrived, heard) if one_process else heard) + costs.member
        server = max(server, arrived + FLAG_SECONDS * (not one_process) + round_trip / 2) + reading
    looked = server + count * (WAKE_SECONDS + costs.look)
    told = looked + count * costs.send + round_trip / 2
    behind = looked + round_trip / 2 + count * costs.member
    return max(told + costs.member, behind) if one_process else told + costs.member


def head_seconds(costs: Costs) -> float:
    """The head's CPU seconds for each member: two lines there, two back (an answer, and that all
    ranks have seen the step), and the looks at them."""
    return 2 * (costs.send + costs.read * (1 + costs.look / WAKE_SECONDS) + costs.look)


def each(times: int, act: Callable[[], object]) -> float:
    """CPU seconds of doing something once."""
    began = time.process_time()
    for _ in range(times):
        act()
    return (time.process_time() - began) / times


class RealHub:
    """The product's hub, turned by hand, with real connections of this process."""

    def __init__(self) -> None:
        self.job = JobState(run_id="r", job="job", identity="i", head="head", incarnation=1)
        self.mine = MemberState(node="head", incarnation=1)
        listener = socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS)
        place = listener.getsockname()
        self.hub = Hub(listener, self.mine, self.job, lambda: None)
        self.members = []
        for number in range(CONNECTIONS):
            self.members.append(LineSocket(socket.create_connection(place)))
            self.members[-1].send(encode_member(MemberState(node=f"node{number}")))
        self._turn_until(lambda: len(self.hub.heard[0]) == CONNECTIONS + 1)
        self._drain()

    def _turn_until(self, done: Callable[[], bool]) -> None:
        limit = time.monotonic() + LIMIT_SECONDS
        while not done():
            self.hub.turn()
            if time.monotonic() > limit:
                raise RuntimeError("the hub does not take in what was sent")

    def _drain(self) -> list[bytes]:
        return [line for one in self.members for line in one.receive()]

    def send(self, number: int) -> float:
        """Publish a request; return the hub's CPU seconds for each member."""
        self.job.requests = [Request(number, RequestKind.SAVE)]
        self.hub.say(self.mine, self.job)
        took = each(1, lambda: self._turn_until(self._is_out))
        assert self._drain()
        return took / CONNECTIONS

    def _is_out(self) -> bool:
        return self.hub.job.requests == self.job.requests

    def read(self, number: int) -> float:
        """Have all members answer; return the hub's CPU seconds for each."""
        answers = {number: NodeAnswer(7, started=True)}
        for place, one in enumerate(self.members):
            state = MemberState(node=f"node{place}", incarnation=1, answers=answers)
            one.send(encode_member(state))

        def is_known() -> bool:
            states = [seen.state for seen in self.hub.heard[0].values()]
            return sum(number in state.answers for state in states) == CONNECTIONS

        looks = each(1, is_known)
        took = each(1, lambda: self._turn_until(is_known))
        return max(0.0, took - looks) / CONNECTIONS

    def close(self) -> None:
        """Close all connections."""
        for one in self.members:
            one.close()
        self.hub.close()


def measure_costs(times: int) -> Costs:
    """The product's functions on real lines, over real connections."""
    real = RealHub()
    rounds = range(1, times + 1)
    sends, reads = [], []
    for number in rounds:
        sends.append(real.send(number))
        reads.append(real.read(number))
    real.close()
    line = encode_job(real.job)
    state = MemberState(node="node00001", answers={1: NodeAnswer(7, started=True)})
    words = each(1_000, lambda: (decode_job(line[:-1]), encode_member(state)))
    send, read = statistics.median(sends), statistics.median(reads)
    return Costs(send, read, look_cost(1_000), read + send + words)


def look_cost(count: int) -> float:
    """What one look at all members takes, for each."""
    rules = HeadRules(JobState(run_id="r", job="job", identity="i", head="head"))
    seen = {number: Seen(MemberState(node=f"node{number}"), 0.0) for number in range(count)}
    rules.take_in(seen, 0.0)
    rules.launch(1, count, 1)
    for one in seen.values():
        one.state.incarnation = 1
    rules.ask(RequestKind.SAVE)
    looks = [each(1, lambda: rules.take_in(seen, 0.0)) for _ in range(5)]
    return statistics.median(looks) / count


def main() -> None:
    """Print the table."""
    options = read_options(__doc__, repeats=3)
    times = QUICK_TIMES if options.quick else TIMES
    progress("costs of a line")
    costs = [measure_costs(times) for _ in range(options.repeats)]
    usual = Costs(*(
        statistics.median(getattr(one, name) for one in costs)
        for name in ("send", "read", "look", "member")
    ))  # fmt: skip
    report = Report("agreement_latency", "Agreement on a step", {"times": times})
    for name in ("send", "read", "look", "member"):
        found = [1e6 * getattr(one, name) for one in costs]
        report.rows.append(summary(f"{name}, CPU for each member", found, unit="us"))
    for count in COUNTS:
        for trip in ROUND_TRIPS:
            value = 1e3 * predict(count, trip, usual)
            what = f"predicted: {count:,} nodes, round trip {1e3 * trip:g} ms"
            report.rows.append(Row(what, "ms", value, value, value))
    for count in QUICK_MEASURED if options.quick else MEASURED:
        progress(f"{count} members")
        idle, took, asked = measure(count, 3.0, 2 if options.quick else 10, PAUSE_SECONDS)
        asked -= idle * (statistics.mean(took) / 1e3 + PAUSE_SECONDS)  # what beats took meanwhile
        expected = 1e3 * predict(count, 0.0, usual, one_process=True)
        more = {"CPU ms per member": [asked]}
        what = f"measured: {count:,} members of one process"
        report.rows.append(summary(what, took, unit="ms", more=more))
        what = f"same process, predicted: {count:,}"
        more_expected = {"CPU ms per member": 1e3 * head_seconds(usual)}
        report.rows.append(Row(what, "ms", expected, expected, expected, more=more_expected))
        ratio = asked / (1e3 * head_seconds(usual))
        what = f"head's CPU for an agreement, {count:,} members, measured / predicted"
        report.goals.append(goal(what, [ratio], WITHIN))
    load = os.getloadavg()[0]
    report.notes.append(f"load {load:.1f} on {os.cpu_count()} cores; limit {LIMIT_SECONDS:.0f} s")
    report.show(options)


if __name__ == "__main__":
    main()
