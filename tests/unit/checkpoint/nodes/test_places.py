"""Where the shares of a checkpoint are that an earlier run sealed: its ranks have it drained."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.memory.drain import drain
from elastic_ckpt.checkpoint.nodes.copies import copy_shares
from elastic_ckpt.checkpoint.nodes.replica import replicate
from elastic_ckpt.checkpoint.verify import verify_full
from elastic_ckpt.errors import NodeLost
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.supervisor.saves.drain_target import DirectoryTarget
from elastic_ckpt.supervisor.saves.drainer import Drainer
from tests.node_memories import NodeMemories

Make = Callable[..., NodeMemories]


def drain_from(nodes: NodeMemories, node: int, job: JobDirectory) -> None:
    for _ in drain(nodes.sealed(node), DiskTier(job), copy_shares):
        pass


def drainer(nodes: NodeMemories, node: int, job: JobDirectory) -> Drainer:
    token = nodes.servers[node].where[2]
    run: Any = SimpleNamespace(number=5)
    journal = Journal(job, "n")
    target = DirectoryTarget(job, run, journal, print)
    return Drainer(target, nodes.tiers[node], journal, print, lambda: None, token)


def test_another_head_drains_what_its_ranks_have_loaded(nodes: Make, job: JobDirectory) -> None:
    three = nodes(3)
    three.save(7)
    three.restart()
    assert drainer(three, 1, job).pending() == []
    with pytest.raises(NodeLost):
        drain_from(three, 0, job)

    three.look(1, range(3))
    reading = three.bring(1, leader=1)
    reading.mark_verified()
    reading.close()
    [owed] = drainer(three, 1, job).pending()
    assert owed.seal.step == 7
    drain_from(three, 1, job)
    verify_full(job.checkpoint(0, 7))


def test_the_lost_heads_share_is_drained_from_where_it_was_loaded(
    nodes: Make, job: JobDirectory
) -> None:
    three = nodes(3)
    attempt = three.save(7)
    for node, tier in enumerate(three.tiers):
        for share in three.sealed(node).seal.guards:
            replicate(tier.root, share, attempt, lambda _: None)
    three.restart()
    three.servers[0].close()
    three.look(1, [1, 2])
    reading = three.bring(1, leader=1)
    reading.mark_verified()
    reading.close()
    drain_from(three, 1, job)
    verify_full(job.checkpoint(0, 7))


def test_a_drain_that_one_node_knows_of_is_known_to_the_leader(
    nodes: Make, job: JobDirectory
) -> None:
    """Which of them the word of it has reached does not matter."""
    two = nodes(2)
    attempt = two.save(7)
    two.look(0, range(2))
    assert not two.tiers[0].was_drained(attempt)
    held = two.sealed(1)
    held.generation.settle(held.seal)
    two.look(0, range(2))
    assert two.tiers[0].was_drained(attempt)
    assert not two.tiers[0].was_drained("another")


def test_what_has_not_moved_stays_as_it_was_sealed(nodes: Make) -> None:
    two = nodes(2)
    two.save(7)
    two.look(0, range(2))
    reading = two.bring(0)
    reading.mark_verified()
    reading.close()
    assert not (two.sealed(0).generation.slot / "places.json").exists()
    two.restart()
    two.look(0, range(2))
    reading = two.bring(0)
    reading.mark_verified()
    reading.close()
    moved = two.sealed(0).seal
    assert [one.token for one in moved.others] == [two.servers[1].where[2]]
    for step in (8, 9):  # over it: the note is of that attempt alone
        for tier in two.tiers:
            for one in tier.sealed():
                one.generation.settle(one.seal)
        two.restart()
        two.save(step)
        assert two.sealed(0).seal.step == step
        assert two.sealed(0).seal.others[0].token == two.servers[1].where[2]
