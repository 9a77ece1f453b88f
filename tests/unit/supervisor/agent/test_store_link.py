"""How the words of the nodes get to and fro, with a store that a test can break."""

from __future__ import annotations

import threading
import time

from elastic_ckpt.protocol.cluster import JobState, MemberState
from elastic_ckpt.supervisor.agent import store_link as exchange
from elastic_ckpt.supervisor.agent.store_link import StoreLink
from tests.waiting import until


class Memory:
    """A store; ``fails`` makes each call raise, ``stuck`` makes it wait."""

    def __init__(self):
        self.values: dict[str, str] = {}
        self.lock = threading.Lock()
        self.fails = False
        self.moves = threading.Event()
        self.moves.set()

    def _enter(self) -> None:
        self.moves.wait(10)
        if self.fails:
            raise RuntimeError("Connection reset by peer\nand a stack")

    def set(self, key, value):
        self._enter()
        self.values[key] = value

    def add(self, key, amount):
        self._enter()
        with self.lock:
            self.values[key] = str(int(self.values.get(key, "0")) + amount)
            return int(self.values[key])

    def check(self, keys):
        self._enter()
        return all(key in self.values for key in keys)

    def multi_get(self, keys):
        self._enter()
        return [self.values[key].encode() for key in keys]


def member(name: str) -> MemberState:
    return MemberState(node=name)


def job() -> JobState:
    return JobState(run_id="r", job="j", identity="i", head="a")


def links(store: Memory, *names: str) -> list[StoreLink]:
    head = StoreLink(lambda: store, member("a"), job(), lambda: None)
    others = [StoreLink(lambda: store, member(name), None, lambda: None) for name in names]
    until(lambda: len(head.heard[0]) > len(names))
    return [head, *others]


def test_the_head_is_number_0_and_receives_all_reports() -> None:
    store = Memory()
    early = StoreLink(lambda: store, member("b"), None, lambda: None)  # it waits for a head
    time.sleep(0.05)
    assert early.number == -1
    head, late = links(store, "c")
    until(lambda: len(head.heard[0]) == 3)
    assert head.number == 0
    assert {seen.state.node for seen in head.heard[0].values()} == {"a", "b", "c"}
    for link in (early, head, late):
        link.close()


def test_the_newest_report_arrives_after_missed_ones() -> None:
    store = Memory()
    head, other = links(store, "b")
    store.moves.clear()
    mine, state = member("b"), job()
    for number in range(1, 9):
        mine.incarnation = state.incarnation = number
        other.say(mine, None)
        head.say(member("a"), state)
    store.moves.set()
    until(lambda: head.heard[0][other.number].state.incarnation == 8)
    until(lambda: other.job is not None and other.job.incarnation == 8)
    head.close()
    other.close()


def test_silence_is_seen_on_both_sides_and_ends_with_the_next_report() -> None:
    store = Memory()
    head, other = links(store, "b")
    store.moves.clear()
    time.sleep(0.1)
    heard = other.heard_at, head.heard[0][other.number].heard_at
    time.sleep(0.15)
    assert (other.heard_at, head.heard[0][other.number].heard_at) == heard
    store.moves.set()
    until(lambda: other.heard_at > heard[0] and head.heard[0][other.number].heard_at > heard[1])
    head.close()
    other.close()


def test_time_in_which_all_were_stopped_does_not_count() -> None:
    store = Memory()
    head, other = links(store, "b")
    other.close()  # it will not speak again
    time.sleep(0.1)
    store.moves.clear()
    time.sleep(exchange.AWAY_SECONDS + 0.3)
    before = head.heard[1]
    store.moves.set()
    until(lambda: head.heard[1] > before + exchange.AWAY_SECONDS)
    members, until_when = head.heard
    assert until_when - members[other.number].heard_at < 0.5
    head.close()


def test_a_store_that_is_gone_breaks_the_link_with_a_reason() -> None:
    store = Memory()
    woken = threading.Event()
    link = StoreLink(lambda: store, member("a"), job(), woken.set)
    until(lambda: link.job is not None)
    woken.clear()
    store.fails = True
    until(lambda: link.broken)
    assert link.broken == "Connection reset by peer"
    assert woken.wait(5)


def test_an_unreachable_store_breaks_the_link() -> None:
    def refuse():
        raise ConnectionRefusedError(111, "Connection refused")

    link = StoreLink(refuse, member("b"), None, lambda: None)
    until(lambda: link.broken)
    assert "Connection refused" in link.broken


def test_an_invalid_report_breaks_the_link() -> None:
    store = Memory()
    store.values["job"] = '1 {"run_id": 7}'
    link = StoreLink(lambda: store, member("b"), None, lambda: None)
    until(lambda: link.broken)


def test_close_sends_the_last_report() -> None:
    store = Memory()
    head, other = links(store, "b")
    leaving = member("b")
    leaving.leaving = True
    other.say(leaving, None)
    other.close()
    until(lambda: head.heard[0][other.number].state.leaving)
    head.close()


def test_link_that_is_closed_before_it_has_entered_does_not_enter() -> None:
    """This node may lead by now, at the same address: it would be there twice, and be given up."""
    store, dials = Memory(), threading.Event()

    def connect() -> Memory:
        dials.wait(10)
        return store

    late = StoreLink(connect, member("a"), None, lambda: None)
    late.close()
    [head] = links(store)
    dials.set()
    head.close()
    until(lambda: not any(one.name == "store-link" for one in threading.enumerate()))
    assert late.number == -1 and store.values["numbers"] == "1"
