"""How the nodes' reports get to the head and back, over real sockets that a test can break."""

from __future__ import annotations

import socket
import threading
import time

import msgspec
import pytest

from elastic_ckpt.protocol.cluster import BEAT_SECONDS, LOST_SECONDS, JobState, MemberState
from elastic_ckpt.supervisor.agent import hub as hubs
from elastic_ckpt.supervisor.agent import hub_link
from elastic_ckpt.supervisor.agent.hub import Hub
from elastic_ckpt.supervisor.agent.hub_link import HubLink
from tests.waiting import until


def member(name: str, incarnation: int = 0) -> MemberState:
    return MemberState(node=name, incarnation=incarnation)


def job(incarnation: int = 0, *roster: int) -> JobState:
    return JobState(
        run_id="r", job="j", identity="i", head="a", incarnation=incarnation, roster=roster
    )


class Head:
    """A hub that listens on this host; its thread runs unless a test takes the turns itself."""

    def __init__(self, first: JobState | None = None, clock=time.monotonic, *, runs: bool = True):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.place = self.listener.getsockname()
        self.woken = threading.Event()
        self.hub = Hub(self.listener, member("a"), first or job(), self.woken.set, clock)
        self.links: list[HubLink | Hub] = [self.hub]
        if runs:
            self.hub.start()

    def link(self, name: str, wake=lambda: None) -> HubLink:
        link = HubLink(lambda: socket.create_connection(self.place, 2), member(name), wake)
        self.links.append(link)
        until(lambda: link.job is not None)
        return link

    def dial(self) -> socket.socket:
        """A member whose every byte the test sends and receives."""
        return socket.create_connection(self.place, 5)

    def states(self) -> dict[str, MemberState]:
        return {seen.state.node: seen.state for seen in self.hub.heard[0].values()}

    def gone(self) -> set[str]:
        return {seen.state.node for seen in self.hub.heard[0].values() if seen.gone}

    def __enter__(self) -> Head:
        return self

    def __exit__(self, *_: object) -> None:
        for link in self.links:
            link.close()
        self.listener.close()


def read_line(connection: socket.socket) -> bytes:
    """The next line that is not a beat."""
    data = b""
    while not data.strip() or not data.endswith(b"\n"):
        if data == b"\n":
            data = b""
        byte = connection.recv(1)
        assert byte, "the connection is closed"
        data += byte
    return data


def test_the_head_is_number_0_and_receives_all_reports() -> None:
    with Head() as head:
        first, second = head.link("b"), head.link("c")
        assert (head.hub.number, first.number, second.number) == (0, 1, 2)
        until(lambda: set(head.states()) == {"a", "b", "c"})
        assert first.job is not None and first.job.head == "a"


def test_a_change_is_sent_at_once_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """No beat is due in the time of this test, and nothing is polled."""
    monkeypatch.setattr(hubs, "BEAT_SECONDS", 1000.0)
    monkeypatch.setattr(hub_link, "BEAT_SECONDS", 1000.0)
    with Head() as head:
        woken = threading.Event()
        link = head.link("b", woken.set)
        for number in range(1, 30):
            woken.clear()
            head.hub.say(member("a"), job(number, 0, 1))
            assert woken.wait(5)
            assert link.job is not None and link.job.incarnation == number
            link.say(member("b", number), None)
            until(lambda number=number: head.states()["b"].incarnation == number)


def test_only_the_newest_of_many_changes_matters() -> None:
    with Head() as head:
        link = head.link("b")
        mine, state = member("b"), job()
        for number in range(1, 200):
            mine.incarnation = state.incarnation = number
            link.say(mine, None)
            head.hub.say(member("a"), state)
        until(lambda: head.states()["b"].incarnation == 199)
        until(lambda: link.job is not None and link.job.incarnation == 199)


def test_nothing_is_sent_without_a_change_but_a_beat_a_second() -> None:
    now = [100.0]
    with Head(clock=lambda: now[0], runs=False) as head, head.dial() as peer:
        peer.sendall(msgspec.json.encode(member("b")) + b"\n")
        until(lambda: head.hub.turn() or len(head.states()) == 2)
        read_line(peer)
        for _ in range(20):
            head.hub.say(member("a"), job())
        now[0] += BEAT_SECONDS
        peer.sendall(b"\n")
        head.hub.turn()
        until(lambda: head.hub.turn() or head.hub.heard[0][1].heard_at == now[0])
        peer.settimeout(0.2)
        assert peer.recv(4096) == b"\n"


def test_a_roster_is_sent_once_for_each_incarnation() -> None:
    roster = tuple(range(700, 1000))
    with Head(job(1, *roster)) as head, head.dial() as peer:
        peer.sendall(msgspec.json.encode(member("b")) + b"\n")
        lines = [read_line(peer)]
        for port in range(5):
            state = job(1, *roster)
            state.port = port + 1
            head.hub.say(member("a"), state)
            lines.append(read_line(peer))
        head.hub.say(member("a"), job(2, *roster[:-1]))
        lines.append(read_line(peer))
        assert [b"998" in line for line in lines] == [True, *[False] * 5, True]
        link = head.link("c")  # it came later, and has the newest one
        assert link.job is not None and link.job.roster == roster[:-1]


def test_a_member_keeps_the_roster_through_changes() -> None:
    with Head(job(1, 0, 1)) as head:
        link = head.link("b")
        state = job(1, 0, 1)
        state.over = True
        head.hub.say(member("a"), state)
        until(lambda: link.job is not None and link.job.over)
        assert link.job is not None and link.job.roster == (0, 1)


def test_silence_is_seen_after_its_time_and_not_before() -> None:
    now = [100.0]
    with Head(clock=lambda: now[0], runs=False) as head, head.dial() as peer:
        peer.sendall(msgspec.json.encode(member("b")) + b"\n")
        until(lambda: head.hub.turn() or len(head.states()) == 2)
        for _ in range(2):
            now[0] += 1.0
            head.hub.turn()
        head.woken.clear()
        assert head.gone() == set()
        now[0] += LOST_SECONDS - 1.9
        head.hub.turn()
        assert head.gone() == {"b"} and head.woken.is_set()


def test_time_in_which_all_were_stopped_does_not_count() -> None:
    now = [100.0]
    with Head(clock=lambda: now[0], runs=False) as head, head.dial() as peer:
        peer.sendall(msgspec.json.encode(member("b")) + b"\n")
        until(lambda: head.hub.turn() or len(head.states()) == 2)
        now[0] += 60.0
        head.hub.turn()
        assert head.gone() == set()
        members, until_when = head.hub.heard
        assert until_when - members[1].heard_at < 0.5
        assert hubs.AWAY_SECONDS < 60


def test_a_member_whose_connection_ends_is_gone_at_once() -> None:
    with Head(clock=lambda: 100.0, runs=False) as head:  # no time passes in which to be silent
        peer = head.dial()
        peer.sendall(msgspec.json.encode(member("b")) + b"\n")
        until(lambda: head.hub.turn() or len(head.states()) == 2)
        peer.close()
        head.hub.turn()
        assert head.gone() == {"b"}


def test_a_member_that_is_given_up_learns_of_it() -> None:
    with Head() as head:
        link = head.link("b")
        state = job()
        state.lost = {link.number}
        head.hub.say(member("a"), state)
        until(lambda: link.broken)
        assert link.job is not None and link.job.lost == {link.number}


def test_beats_keep_both_sides_alive() -> None:
    with Head() as head:
        link = head.link("b")
        heard = link.heard_at, head.hub.heard[0][1].heard_at
        until(lambda: link.heard_at > heard[0] and head.hub.heard[0][1].heard_at > heard[1])


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b'{"node": 7}\n', b"\xff" * 100 + b"\n"]
)
def test_a_stranger_is_turned_away_and_is_no_member(data: bytes) -> None:
    with Head() as head, head.dial() as stranger:
        stranger.sendall(data)
        assert stranger.recv(100) == b""
        head.link("b")
        until(lambda: set(head.states()) == {"a", "b"})


def test_a_connection_that_ended_before_the_head_came_is_no_member() -> None:
    """It waited in the kernel; the node has dialled again since."""
    with Head(runs=False) as head:
        peer = head.dial()
        peer.sendall(msgspec.json.encode(member("b")) + b"\n")
        peer.close()
        head.hub.start()
        head.link("b")
        assert [seen.state.node for seen in head.hub.heard[0].values()] == ["a", "b"]


def test_a_head_that_goes_breaks_the_link_with_a_reason() -> None:
    with Head() as head:
        woken = threading.Event()
        link = head.link("b", woken.set)
        woken.clear()
        head.hub.close()
        until(lambda: link.broken)
        assert link.broken == "the other end has closed the connection"
        assert woken.wait(5)


def test_an_unreachable_head_breaks_the_link() -> None:
    def refuse() -> socket.socket:
        raise ConnectionRefusedError(111, "Connection refused")

    link = HubLink(refuse, member("b"), lambda: None)
    until(lambda: link.broken)
    assert "Connection refused" in link.broken


def test_a_head_that_does_not_answer_breaks_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_link, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = silent.getsockname()
        link = HubLink(lambda: socket.create_connection(place, 2), member("b"), lambda: None)
        until(lambda: link.broken)
        assert "has not answered" in link.broken


def test_an_invalid_report_breaks_the_link() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
        link = HubLink(lambda: socket.create_connection(place, 2), member("b"), lambda: None)
        accepted, _ = server.accept()
        with accepted:
            accepted.sendall(b'{"job": {"run_id": 7}}\n')
            until(lambda: link.broken)


def test_close_sends_the_last_report() -> None:
    with Head() as head:
        link = head.link("b")
        leaving = member("b")
        leaving.leaving = True
        link.say(leaving, None)
        link.close()
        until(lambda: head.states()["b"].leaving)


def test_a_peer_that_does_not_read_holds_up_nobody() -> None:
    with Head() as head, head.dial() as deaf:
        deaf.sendall(msgspec.json.encode(member("b")) + b"\n")
        until(lambda: len(head.states()) == 2)
        other = head.link("c")
        state = job()
        state.arguments = ("x" * 100_000,)
        for number in range(1, 101):
            state.incarnation = number
            head.hub.say(member("a"), state)
            until(lambda n=number: other.job is not None and other.job.incarnation == n)
        until(lambda: head.gone() == {"b"})


def test_link_that_is_closed_before_it_has_entered_does_not_enter() -> None:
    """This node may lead by now, at the same address: it would be there twice, and be given up."""
    dials = threading.Event()
    with Head() as head:

        def connect() -> socket.socket:
            dials.wait(10)
            return head.dial()

        late = HubLink(connect, member("late"), lambda: None)
        late.close()
        dials.set()
        until(lambda: not any(one.name == "hub-link" for one in threading.enumerate()))
        assert late.number == -1
        assert "late" not in head.states()
