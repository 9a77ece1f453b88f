"""The head's rules: who is present, which request is answered when, how an incarnation ends."""

from __future__ import annotations

import random

import pytest

from elastic_ckpt.policy.hang import StalledNode
from elastic_ckpt.protocol.agreement import RequestKind
from elastic_ckpt.protocol.cluster import (
    GATHER_SECONDS,
    LOST_SECONDS,
    STUCK_SECONDS,
    Gathering,
    HeadRules,
    JobState,
    MemberState,
    NodeAnswer,
    Seen,
    eligible,
)
from elastic_ckpt.protocol.ended import Ended, EndKind


class Nodes:
    """Members whose reports a test sets, and a head that receives them."""

    def __init__(self, *names: str):
        self.head = HeadRules(JobState(run_id="r", job="j", identity="i", head=names[0]))
        self.states = {number: MemberState(node=name) for number, name in enumerate(names)}
        self.heard = dict.fromkeys(self.states, 0.0)
        self.now = 0.0

    def __getitem__(self, number: int) -> MemberState:
        return self.states[number]

    def join(self, name: str) -> int:
        number = len(self.states)
        self.states[number] = MemberState(node=name)
        self.heard[number] = self.now
        return number

    def report(self, *silent: int, after: float = 0.1) -> JobState:
        """All but the silent ones speak."""
        self.now += after
        self.heard |= {number: self.now for number in self.states if number not in silent}
        seen = {number: Seen(state, self.heard[number]) for number, state in self.states.items()}
        self.head.take_in(seen, self.now)
        return self.head.state

    def launch(self, number: int = 1, most: int = 9) -> tuple[int, ...]:
        self.report()
        roster = self.head.launch(number, most, 4711)
        for one in roster:
            self.states[one].incarnation = number
            self.states[one].answers, self.states[one].ended = {}, None
        return roster

    def end(self, number: int, kind: str, **about) -> None:
        state = self.states[number]
        state.ended = Ended(incarnation=state.incarnation, kind=EndKind(kind), **about)


def test_the_head_is_the_first_of_a_roster_that_most_bounds() -> None:
    nodes = Nodes("a", "b", "c")
    assert nodes.launch(most=2) == (0, 1)
    assert nodes.head.present() == {0: "a", 1: "b", 2: "c"}


def test_a_leaving_node_is_not_in_the_next_incarnation() -> None:
    nodes = Nodes("a", "b")
    nodes.launch()
    nodes[1].leaving = True
    nodes.report()
    assert nodes.head.present() == {0: "a"}


def test_the_answer_is_the_largest_of_all_nodes_and_waits_for_each() -> None:
    nodes = Nodes("a", "b")
    nodes.launch()
    nodes[1].asks = {1: RequestKind.STOP}
    (request,) = nodes.report().requests
    assert (request.number, request.kind, request.step) == (1, RequestKind.STOP, None)
    nodes[0].answers = {1: NodeAnswer(11, True)}
    assert nodes.report().requests[0].step is None
    nodes[1].answers = {1: NodeAnswer(12, True)}
    (request,) = nodes.report().requests
    assert (request.step, request.idle) == (12, False)


def test_answers_of_an_earlier_incarnation_are_ignored() -> None:
    nodes = Nodes("a", "b")
    nodes.launch(1)
    nodes.end(0, "stopped")
    nodes.end(1, "stopped")
    nodes[0].answers = nodes[1].answers = {1: NodeAnswer(10, True)}
    assert nodes.report().is_over
    nodes.head.launch(2, 9, 4711)
    assert nodes.head.running
    assert nodes.head.state.verdict.incarnation == 1  # for members that have yet to receive it
    nodes[0].incarnation, nodes[0].answers, nodes[0].ended = 2, {1: NodeAnswer(20, True)}, None
    nodes[0].asks = {1: RequestKind.STOP}
    assert nodes.report().requests[0].step is None  # the other one still reports on the first


def test_a_stop_before_any_step_is_idle() -> None:
    nodes = Nodes("a", "b")
    nodes.launch()
    nodes.head.ask(RequestKind.STOP)
    nodes[0].answers, nodes[1].answers = {1: NodeAnswer(-1, False)}, {1: NodeAnswer(7, False)}
    assert nodes.report().requests[0].idle
    nodes.head.state.requests[0].step = None
    nodes[1].answers = {1: NodeAnswer(7, True)}
    assert not nodes.report().requests[0].idle


def test_saves_wait_for_each_other_and_nothing_follows_a_stop() -> None:
    nodes = Nodes("a", "b")
    nodes.launch()
    for kind in (RequestKind.SAVE, RequestKind.SAVE, RequestKind.STOP, RequestKind.STOP):
        nodes.head.ask(kind)
    nodes.head.ask(RequestKind.SAVE_NOW)
    kinds = [request.kind for request in nodes.head.state.requests]
    assert kinds == [RequestKind.SAVE, RequestKind.STOP]


def test_a_save_that_all_have_seen_admits_the_next() -> None:
    nodes = Nodes("a", "b")
    nodes.launch()
    nodes.head.ask(RequestKind.SAVE)
    nodes[0].seen = 1
    nodes.report()
    nodes.head.ask(RequestKind.SAVE)
    assert len(nodes.head.state.requests) == 1
    nodes[1].seen = 1
    nodes.report()
    nodes.head.ask(RequestKind.SAVE)
    assert len(nodes.head.state.requests) == 2


def test_asks_are_served_once_and_only_those_of_the_roster() -> None:
    nodes = Nodes("a", "b", "c")
    nodes.launch(most=2)
    nodes[2].asks = {1: RequestKind.STOP}
    nodes[1].asks = {1: RequestKind.SAVE}
    for _ in range(3):
        nodes.report()
    assert [request.kind for request in nodes.head.state.requests] == [RequestKind.SAVE]


def test_a_silent_node_is_lost_and_ends_the_incarnation() -> None:
    nodes = Nodes("a", "b")
    nodes.launch()
    assert not nodes.report(1, after=LOST_SECONDS - 0.2).over
    state = nodes.report(1, after=0.4)
    assert state.over and state.lost == {1} and state.verdict is None
    nodes.end(0, "cut-short")
    state = nodes.report(1)
    assert state.verdict is not None
    assert (state.verdict.lost, state.verdict.kind) == (("b",), EndKind.CRASHED)
    assert nodes.head.present() == {0: "a"}


def test_a_lost_node_stays_lost_when_it_reports_again() -> None:
    nodes = Nodes("a", "b")
    nodes.report()
    nodes.report(1, after=LOST_SECONDS + 0.1)
    assert nodes.report().lost == {1}
    assert nodes.join("b") == 2
    nodes.report()
    assert nodes.head.present() == {0: "a", 2: "b"}


def test_a_node_that_returns_replaces_its_old_number_at_once() -> None:
    """Its agent was killed and started again: no wait for its silence."""
    nodes = Nodes("a", "b")
    nodes.launch()
    nodes.join("b")
    state = nodes.report()
    assert state.lost == {1} and state.over


def test_a_crash_ends_the_incarnation_after_every_report() -> None:
    nodes = Nodes("a", "b", "c")
    nodes.launch()
    nodes.end(1, "crashed", rank=1, exit_code=-9, message="killed by SIGKILL")
    state = nodes.report()
    assert state.over and state.verdict is None
    nodes.end(0, "cut-short")
    assert nodes.report().verdict is None
    nodes.end(2, "cut-short")
    verdict = nodes.report().verdict
    assert verdict is not None and verdict.rank == 1
    assert not nodes.head.running


def test_a_failure_due_to_a_stop_before_any_step_does_not_count() -> None:
    nodes = Nodes("a", "b", "c")
    nodes.launch()
    nodes.head.ask(RequestKind.STOP)
    for number in nodes.states:
        nodes[number].answers = {1: NodeAnswer(-1, False)}
    nodes.report()
    nodes.end(0, "not-begun")
    nodes.end(1, "not-begun")
    nodes.end(2, "crashed", rank=2, exit_code=1, message="connection reset")
    verdict = nodes.report().verdict
    assert verdict is not None
    assert (verdict.kind, verdict.rank, verdict.exit_code) == (EndKind.NOT_BEGUN, -1, 0)


def test_a_node_that_cannot_end_its_workers_is_given_up() -> None:
    nodes = Nodes("a", "b", "c")
    nodes.launch()
    nodes.end(0, "crashed", rank=0)
    nodes.end(1, "cut-short")
    assert nodes.report().over
    nodes.report()
    assert nodes.report(after=STUCK_SECONDS - 1).verdict is None
    verdict = nodes.report(after=2.0).verdict
    assert verdict is not None and verdict.lost == ("c",)


def test_finished_nodes_delay_no_answer_and_hide_no_hang() -> None:
    nodes = Nodes("a", "b")
    nodes.launch()
    nodes.end(1, "completed")
    nodes.head.ask(RequestKind.SAVE)
    nodes[0].answers, nodes[0].idle = {1: NodeAnswer(9, True)}, True
    state = nodes.report()
    assert state.requests[0].step == 9
    assert state.hung
    nodes[0].stuck = StalledNode((), (), {})
    nodes.report()
    assert nodes.head.stuck() == ((StalledNode((), (), {}),), True)


def test_a_hang_takes_the_ranks_of_all_nodes() -> None:
    nodes = Nodes("a", "b")
    nodes.launch()
    nodes[0].idle = True
    assert not nodes.report().hung
    nodes[1].idle = True
    assert nodes.report().hung


@pytest.mark.parametrize("seed", range(200))
def test_in_any_order_of_reports_an_incarnation_ends_and_no_answer_changes(seed: int) -> None:
    """Nodes speak late, ask, enter steps, crash and vanish at random."""
    dice = random.Random(seed)
    nodes = Nodes("a", "b", "c")
    nodes.launch()
    entered = dict.fromkeys(nodes.states, 0)
    answers: dict[int, int] = {}
    gone: set[int] = set()
    for _ in range(120):
        one = dice.choice([0, 1, 2])
        state = nodes[one]
        for request in nodes.head.state.requests:
            if dice.random() < 0.5 and request.number not in state.answers and one not in gone:
                state.answers = {**state.answers, request.number: NodeAnswer(entered[one], True)}
        flagged = max(state.answers, default=0)
        open_step = next((r.step for r in nodes.head.state.requests if r.number == flagged), None)
        if not flagged or (open_step is not None and entered[one] < open_step):
            entered[one] += 1
        if open_step is not None:
            state.seen = flagged
        if dice.random() < 0.1:
            count = max(state.asks, default=0) + 1
            state.asks = {count: dice.choice([RequestKind.SAVE, RequestKind.STOP])}
        if dice.random() < 0.02:
            nodes.end(one, "crashed", rank=one)
        if dice.random() < 0.01 and one:
            gone.add(one)
        job = nodes.report(*gone, after=dice.uniform(0.0, 0.3))
        for request in job.requests:
            if request.step is not None:
                assert answers.setdefault(request.number, request.step) == request.step
        if job.over:
            for number in nodes.states:
                if nodes[number].ended is None and number not in gone and dice.random() < 0.5:
                    nodes.end(number, "cut-short")
    for _ in range(40):
        if not nodes.head.state.over:
            nodes.end(0, "crashed")
        for number in nodes.states:
            if nodes[number].ended is None and number not in gone:
                nodes.end(number, "cut-short")
        nodes.report(*gone)
    assert nodes.head.state.verdict is not None
    lost = set(nodes.head.state.verdict.lost)
    unsaid = {nodes[number].node for number in gone if nodes[number].ended is None}
    assert unsaid <= lost <= {nodes[number].node for number in gone}


class Counter(int):
    """A member's number that counts how often the rules compare or look up one."""

    looks = 0

    def __eq__(self, other: object) -> bool:
        Counter.looks += 1
        return int(self) == other

    def __hash__(self) -> int:
        Counter.looks += 1
        return int(self)


def looks_of(count: int) -> int:
    """How often the rules look at a number while ``count`` nodes agree, one crashes, one is lost
    and all end."""
    nodes = Nodes("head")
    nodes.states = {Counter(one): MemberState(node=f"n{one}") for one in range(count)}
    nodes.heard = dict.fromkeys(nodes.states, 0.0)
    Counter.looks = 0
    nodes.launch(most=count)
    for state in nodes.states.values():
        state.asks = {1: RequestKind.SAVE}
    nodes.report()
    for state in nodes.states.values():
        state.answers = {1: NodeAnswer(9, True)}
    assert nodes.report().requests[0].step == 9
    nodes.end(Counter(1), "crashed", rank=1)
    nodes.report(Counter(2), after=LOST_SECONDS + 1)
    for number in nodes.states:
        if number != 2:
            nodes.end(number, "cut-short")
    assert nodes.report(Counter(2)).verdict is not None
    nodes.head.present()
    return Counter.looks


def test_the_rules_look_at_each_member_a_constant_number_of_times() -> None:
    small, large = looks_of(50), looks_of(500)
    assert large < 12 * small


def test_a_member_whose_connection_is_over_is_lost_at_once() -> None:
    nodes = Nodes("a", "b")
    nodes.launch()
    heard = {number: Seen(state, 0.2) for number, state in nodes.states.items()}
    nodes.head.take_in(heard | {1: Seen(nodes[1], 0.2, gone=True)}, 0.2)
    assert nodes.head.state.lost == {1} and nodes.head.state.over


def test_a_job_begins_with_all_nodes_or_after_a_wait_with_enough() -> None:
    gathering = Gathering(2, 4)
    assert not gathering.may_launch(1, 100.0)
    assert not gathering.may_launch(2, 101.0)
    assert not gathering.may_launch(2, 101.0 + GATHER_SECONDS - 0.1)
    assert not gathering.may_launch(3, 101.0 + GATHER_SECONDS)
    assert gathering.may_launch(3, 101.1 + 2 * GATHER_SECONDS)
    assert Gathering(2, 4).may_launch(4, 0.5)


def test_the_remaining_nodes_continue_at_once() -> None:
    gathering = Gathering(1, 4, expected=2)
    assert gathering.may_launch(2, 5.0)
    assert not Gathering(3, 4, expected=2).may_launch(2, 1000.0)


def test_a_job_grows_when_a_node_has_stayed_and_there_is_room() -> None:
    gathering = Gathering(1, 3)
    assert not gathering.may_grow(2, 2, 10.0)
    assert not gathering.may_grow(3, 3, 11.0)
    gathering = Gathering(1, 4)
    assert not gathering.may_grow(2, 1, 10.0)
    assert gathering.may_grow(2, 1, 10.1 + GATHER_SECONDS)
    assert gathering.may_grow(4, 1, 20.0)
    assert not gathering.may_grow(9, 4, 99.0)


@pytest.mark.parametrize(
    ("left_out", "least", "expected"),
    [
        ("", 1, "abcd"),
        ("b", 1, "acd"),
        ("bc", 2, "ad"),
        ("bc", 3, "abd"),  # only as many as are needed, the first ones first
        ("a", 4, "abcd"),  # the head stays the first
        ("a", 1, "bcd"),
        ("abc", 2, "ad"),
        ("abcd", 1, "abcd"),  # all are: the cause is something that they share
        ("x", 9, "abcd"),
    ],
)
def test_nodes_that_are_left_out_take_part_only_as_far_as_needed(
    left_out: str, least: int, expected: str
) -> None:
    assert "".join(eligible("abcd", set(left_out), least)) == expected


def test_an_incarnation_begins_without_nodes_that_are_left_out() -> None:
    nodes = Nodes("a", "b", "c")
    nodes[1].unfit = "disk: no"
    nodes.report()
    assert nodes.head.unfit() == {"b": "disk: no"}
    assert nodes.head.launch(1, 9, 4711, without=("b",)) == (0, 2)
    assert nodes.head.running_names() == ("a", "c")
    assert nodes.head.launch(2, 1, 4711) == (0,)


def test_the_verdict_names_the_node_of_the_worker_that_failed_first() -> None:
    nodes = Nodes("a", "b")
    nodes.launch()
    nodes.end(0, "crashed", rank=0, exit_code=1, failed_wall=2.0, node="a")
    nodes.end(1, "crashed", rank=1, exit_code=1, failed_wall=1.0, node="b")
    assert nodes.report().verdict.node == "b"
    nodes.launch(2)
    nodes.end(0, "completed", node="a")
    nodes.end(1, "completed", node="b")
    assert nodes.report().verdict.node == ""


def test_an_incarnation_is_replaced_once_the_nodes_have_stayed() -> None:
    gathering = Gathering(1, 3)
    assert not gathering.may_replace(2, 10.0)
    assert gathering.may_replace(2, 10.1 + GATHER_SECONDS)
    assert not gathering.may_replace(1, 20.0)
