"""When a head leaves the job to its other nodes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.policy.deadline import Notice
from elastic_ckpt.protocol.messages import Finish, Nodes
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.protocol.succession import Follow, Leader
from elastic_ckpt.supervisor.cluster.head import HeadRole

SIGTERM, SIGINT = Notice("signal", "SIGTERM", 90.0), Notice("signal", "SIGINT", 90.0)
SPOT = Notice("aws", "spot", 90.0)


class Run:
    """A run of a head whose storage says that ``leads`` leads."""

    def __init__(
        self, notice: Notice | None = None, *, started_others: bool = False, is_kept: bool = False
    ) -> None:
        self.now = 100.0
        self.state = RunState.PREEMPTED
        self.goes_on: Follow | None = None
        self.lost = ""
        self.leads: Leader | None = None
        self.passed_on = False
        self.sent: list[Any] = []
        self.agent = SimpleNamespace(send=self.sent.append, gone=False)
        self.settings = SimpleNamespace(
            node="n1", endpoint="n1:29400", started_others=started_others, gather_seconds=60.0,
            notice_sources=(),
        )  # fmt: skip
        self.preemption = SimpleNamespace(
            notice=notice, stops_at_once=False, patience=lambda seconds: seconds
        )
        self.ports = SimpleNamespace(
            directory=self, journal=SimpleNamespace(write=lambda event: None),
            memory=SimpleNamespace(kept_by_peer=lambda: ((0, 0, 7), "n2") if is_kept else None),
            board=SimpleNamespace(hand_over_seconds=1.5),
        )  # fmt: skip
        self.record = SimpleNamespace(
            say=lambda line: None, update=lambda **_: None,
            node=SimpleNamespace(exit_code=75, message="preempted"),
        )  # fmt: skip
        self.incarnations = SimpleNamespace(may_launch=True, end_agent=lambda: None)

    def pass_on(self) -> None:
        self.passed_on = True

    def leader(self) -> Leader | None:
        return self.leads


@pytest.mark.parametrize(
    ("run", "others", "stays"),
    [
        (Run(SIGTERM), ("n2", "n3"), True),
        (Run(SPOT), ("n2", "n3"), True),
        (Run(SPOT), ("n2",), False),
        (Run(SIGINT), ("n2", "n3"), False),
        (Run(), ("n2", "n3"), False),
        (Run(SIGTERM, started_others=True), ("n2", "n3"), False),
        (Run(SPOT, started_others=True), ("n2", "n3"), True),
        (Run(SPOT, is_kept=True), ("n2",), True),
        (Run(SIGINT, is_kept=True), ("n2", "n3"), True),
    ],
)
def test_platform_takes_a_node_and_a_person_the_job(
    run: Any, others: tuple[str, ...], stays: bool
) -> None:
    role = HeadRole((2, 4))
    role.on_event(run, Nodes(others, 0))
    role.announce_end(run)
    assert run.sent == [Finish(75, "preempted", stays)] and run.passed_on is stays


@pytest.mark.parametrize(
    ("notice", "others", "sources", "seconds"),
    [
        (SPOT, ("n2", "n3"), (), 1.5),
        (SPOT, ("n2", "n3"), ("aws",), 1.5),
        (SPOT, ("n2",), (), 0.0),
        (SIGINT, ("n2", "n3"), (), 0.0),
        (SIGTERM, ("n2", "n3"), ("slurm",), 0.0),
    ],
)
def test_a_job_that_ends_with_its_head_is_saved_to_the_disk(
    notice: Notice, others: tuple[str, ...], sources: tuple[str, ...], seconds: float
) -> None:
    run: Any = Run()
    run.settings.notice_sources = sources
    role = HeadRole((2, 4))
    role.on_event(run, Nodes(others, 0))
    role.before_notice(run, notice)
    assert run.ports.board.hand_over_seconds == seconds


@pytest.mark.parametrize(
    ("nodes", "gives_up"),
    [
        (Nodes(("n1",), 0, lost=2, roster=3), True),
        (Nodes(("n1",), 0, lost=1, roster=2), False),
        (Nodes(("n1", "n2"), 0, lost=1, roster=3), False),
        (Nodes(("n1", "n2", "n3"), 0, lost=2, roster=3), False),  # they are back
    ],
)
def test_head_without_most_of_its_nodes_lets_them_lead(nodes: Nodes, gives_up: bool) -> None:
    run: Any = Run()
    role = HeadRole((4, 4))  # so that it launches nothing
    role.on_event(run, nodes)
    role.serve_start(run, 100.0)
    assert run.passed_on is gives_up and (run.goes_on is not None) is gives_up


def test_head_that_was_taken_over_joins_a_head_and_nothing_else() -> None:
    run: Any = Run()
    role = HeadRole((1, 4))
    run.lost = "pid 7 on h2 has taken over"
    assert role.gives_way(run) and run.goes_on is None  # the storage has not answered
    run.leads = Leader(5, "n2", "n2:29400", b"b 1")
    assert role.gives_way(run) and run.goes_on == Follow(run.leads)
    alone: Any = Run()
    alone.lost, alone.leads = run.lost, Leader(5, "n2", "", b"b 1")
    assert not HeadRole((1, 4)).gives_way(alone)


def test_head_does_not_wait_forever_to_learn_who_has_taken_over() -> None:
    run: Any = Run()
    run.lost = "pid 7 on h2 has taken over"
    role = HeadRole((1, 4))
    assert role.gives_way(run)
    run.now += 6.0
    assert not role.gives_way(run)
