"""Nodes are lost, one or two at once: no step goes that has a replica, but without the rules."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from elastic_ckpt.checkpoint.nodes import pairs
from elastic_ckpt.checkpoint.nodes.tier import NodesMemory
from elastic_ckpt.checkpoint.ownership.fence import Fence
from elastic_ckpt.supervisor.cluster import member
from tests.simulation import shared_memory
from tests.simulation.faults import outcome, preempt_by_signal
from tests.simulation.losses import LossWorld, lose, simulate_losses
from tests.simulation.shared_memory import REPLICATED_SECONDS, SharedMemory
from tests.simulation.world import is_at_step, when

JOBS = int(os.environ.get("ELASTIC_CKPT_LOSSES", "12"))
"""``make simulate-losses`` runs 900, in which nodes are lost a thousand times."""

UNCAUGHT = 40
"""A bug that this number of schedules does not find counts as unnoticed."""


def test_no_sealed_step_is_lost_with_nodes() -> None:
    kept = Counter[str]()
    for seed in range(1, JOBS + 1):
        error, world = simulate_losses(seed)
        assert error is None, f"replay with: python -m tests.simulation.losses {seed}"
        kept += world.kept
    assert kept.total() > 0  # else nothing was looked at


def domain_is_lost() -> tuple[str | None, LossWorld]:
    """Half of four nodes vanish at once, when the disk has nothing of what is in memory."""
    world = LossWorld(1)
    world.nodes, world.total_steps = (1, 4), 40
    world.step_seconds, world.interval_steps = 1.0, 6
    world.shared_memory = SharedMemory(world, replicas=1, drain_seconds=1000.0)
    for host, domain in zip(world.hosts, "abab", strict=True):
        host.domain = domain

    def has_had_time() -> bool:
        newest = world.shared_memory.newest
        return newest is not None and world.kernel.now > newest.at + REPLICATED_SECONDS

    half = [host for host in world.hosts if host.domain == "b"]
    when(world, has_had_time, lambda: lose(world, half))
    return outcome(world), world


def test_no_sealed_step_is_lost_with_a_domain() -> None:
    error, world = domain_is_lost()
    assert error is None
    assert world.kept == {"a domain lost": 1}


def test_step_would_be_lost_with_a_domain_if_pairs_ignored_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pairs, "_steps", lambda order: list(range(1, len(order))))
    error, _ = domain_is_lost()
    assert error is not None and "a domain lost, and step 6 is lost" in error


def head_leaves(nodes: tuple[int, int]) -> tuple[str | None, LossWorld]:
    """The head of three nodes gets a notice when the disk has nothing of what is in memory."""
    world = LossWorld(4)
    world.nodes, world.total_steps = nodes, 40
    world.step_seconds, world.interval_steps = 1.0, 12
    world.shared_memory = SharedMemory(world, replicas=1, drain_seconds=8.0, hands_over=True)
    head = world.first.head
    when(world, lambda: is_at_step(world, 17), lambda: preempt_by_signal(world, head))
    return outcome(world), world


def test_the_next_head_drains_what_others_keep_for_the_one_that_left() -> None:
    error, world = head_leaves((2, 3))
    assert error is None
    assert world.kept == {"handed over by the head": 1}
    save = next(one for one in world.shared_memory.saves if one.is_handed_over)
    assert save.checkpoint.key in world.disk.sealed
    assert any(gang.start_step == save.checkpoint.key[1] for gang in world.gangs)


def test_a_job_that_ends_with_its_head_is_saved_to_the_disk() -> None:
    error, world = head_leaves((3, 3))
    assert error is None
    assert world.kept == {} and not world.shared_memory.handed_over


# -- bugs put in ------------------------------------------------------------------------------


def nobody_keeps_a_replica(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shared_memory, "guarded_by", lambda node, shares, replicas: ())


def loads_ignore_replicas(patch: pytest.MonkeyPatch) -> None:
    whole = NodesMemory._shares

    def shares(self: NodesMemory, attempt: str, world_size: int) -> Any:
        for report in self._reports:
            report.held[:] = [one for one in report.held if not one.is_replica]
        return whole(self, attempt, world_size)

    patch.setattr(NodesMemory, "_shares", shares)


def lost_link_is_enough_to_lead(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(member, "SURVIVOR_LEASE_SECONDS", 0.0)


def former_head_does_not_look_who_leads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Fence, "check", lambda self: None)


def a_node_keeps_its_own_share(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shared_memory, "keepers", lambda node, shares: (node,))
    patch.setattr(SharedMemory, "_can_keep", lambda self, host, keeper: True)


BUGS = [
    (a_node_keeps_its_own_share, 1, "and lies"),
    (nobody_keeps_a_replica, 20, "is lost"),
    (loads_ignore_replicas, 1, "is lost"),
    (lost_link_is_enough_to_lead, 1, "which is well"),
    (former_head_does_not_look_who_leads, 10, "has loaded"),
]


@pytest.mark.parametrize(("bug", "first", "found"), BUGS)
def test_bug_is_caught(bug: Callable[[pytest.MonkeyPatch], None], first: int, found: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        errors = (simulate_losses(seed)[0] for seed in range(first, first + UNCAUGHT))
        assert any(found in (error or "") for error in errors)
