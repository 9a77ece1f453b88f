"""A head with hundreds of members: every loss noticed in time, none invented, one launch for each
batch of changes; and each of some bugs breaks that. ``make simulate-nodes`` has 10,000 members."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from elastic_ckpt.protocol import cluster
from elastic_ckpt.protocol.cluster import Gathering, HeadRules, MemberState
from elastic_ckpt.supervisor.agent import hub
from elastic_ckpt.supervisor.agent.hub import Hub
from tests.simulation.kernel import Violation
from tests.simulation.many_nodes import live

MEMBERS = 500
GOAL_MS = 1.0


def test_a_job_of_many_nodes_notices_every_loss_and_invents_none() -> None:
    world = live(MEMBERS, seed=1)
    assert (len(world.lost_at), world.launches, len(world.latencies)) == (6, 5, 8)
    assert max(world.latencies) < 1.0  # virtual seconds
    assert 0 < world.cost.milliseconds < GOAL_MS


# -- bugs put in ------------------------------------------------------------------------------


def silent_members_are_waited_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cluster, "LOST_SECONDS", 1e9)
    patch.setattr(hub, "LOST_SECONDS", 1e9)


def members_are_given_up_too_soon(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hub, "LOST_SECONDS", 0.9 * hub.BEAT_SECONDS)


def closed_connections_are_not_noticed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Hub, "_drop", lambda self, connection, why: None)


def head_does_not_beat(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hub, "BEAT_SECONDS", 1e9)


def nodes_that_leave_are_launched_again(patch: pytest.MonkeyPatch) -> None:
    whole = HeadRules.take_in

    def take_in(self: HeadRules, members: dict[int, cluster.Seen], now: float) -> None:
        for seen in members.values():
            seen.state.leaving = False
        whole(self, members, now)

    patch.setattr(HeadRules, "take_in", take_in)


def each_node_that_joins_is_a_change(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Gathering, "may_grow", lambda self, present, running, now: present > running)


def first_answer_counts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cluster, "answer_step", lambda entered: next(iter(entered)))


def roster_is_sent_without_its_last(patch: pytest.MonkeyPatch) -> None:
    whole = HeadRules.launch

    def launch(self: HeadRules, *arguments: Any) -> tuple[int, ...]:
        roster = whole(self, *arguments)
        self.state.roster = roster[:-1]
        return self.state.roster

    patch.setattr(HeadRules, "launch", launch)


def report_is_taken_from_the_wrong_member(patch: pytest.MonkeyPatch) -> None:
    whole = Hub._take

    def take(self: Hub, connection: hub._Connection, state: MemberState, now: float) -> None:
        whole(self, connection, state, now)
        self._reports[max(1, connection.number - 1)] = state

    patch.setattr(Hub, "_take", take)


BUGS = (
    silent_members_are_waited_for,
    members_are_given_up_too_soon,
    closed_connections_are_not_noticed,
    head_does_not_beat,
    nodes_that_leave_are_launched_again,
    each_node_that_joins_is_a_change,
    first_answer_counts,
    roster_is_sent_without_its_last,
    report_is_taken_from_the_wrong_member,
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_each_of_these_bugs_is_noticed(
    bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    with pytest.raises(Violation):
        live(60, seed=1)
