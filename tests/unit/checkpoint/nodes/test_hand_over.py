"""What a node has in memory that leaves: another one keeps it until the disk has it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.memory.drain import drain
from elastic_ckpt.checkpoint.nodes import link
from elastic_ckpt.checkpoint.nodes.client import PIECE_BYTES, settle
from elastic_ckpt.checkpoint.nodes.copies import copy_shares
from elastic_ckpt.checkpoint.nodes.pairs import keepers
from elastic_ckpt.checkpoint.nodes.replica import drop_strangers, replicas, replicate
from elastic_ckpt.checkpoint.nodes.tier import SharesAttempt
from elastic_ckpt.checkpoint.verify import verify_full
from elastic_ckpt.errors import CheckpointRejected, NodeLost
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.node_memories import NodeMemories

Make = Callable[..., NodeMemories]


def everything(directory: Path) -> dict[str, bytes]:
    found = directory.rglob("*")
    return {str(one.relative_to(directory)): one.read_bytes() for one in found if one.is_file()}


def attempt_of(nodes: NodeMemories, node: int) -> SharesAttempt:
    """Begin a save on all nodes, and return a node's attempt."""
    shares = [
        msgspec.structs.replace(one.share, leaves=number in nodes.leaving)
        for number, one in enumerate(nodes.tiers)
    ]
    tier = nodes.tiers[node]
    return tier.attempt(tier.make_room(7, 1000, replaces=False), "7" * 16, shares)


def soon() -> float:
    return time.monotonic() + 20


def test_those_that_stay_have_all_of_it_when_it_is_sealed(nodes: Make, job: JobDirectory) -> None:
    three = nodes(3)
    three.leaving = {2}
    attempt = three.save(7)
    three.servers[2].close()
    assert three.look(0, [0, 1]) == [attempt]
    reading = three.bring(1)
    assert everything(reading.path) == three.contents
    reading.close()
    for _ in drain(three.sealed(0), DiskTier(job), copy_shares):
        pass
    on_disk = everything(job.checkpoint(0, 7))
    assert {name: on_disk[name] for name in three.contents} == three.contents
    verify_full(job.checkpoint(0, 7))


def test_the_leader_leaves_and_the_next_node_has_the_last_seal(
    nodes: Make, job: JobDirectory
) -> None:
    three = nodes(3)
    three.leaving = {0}
    attempt = three.save(7)
    assert [three.sealed(node).seal.is_last for node in range(3)] == [False, True, False]
    assert three.sealed(0).settled and three.sealed(0).keeper
    three.servers[0].close()
    assert three.look(1, [1, 2]) == [attempt]
    for _ in drain(three.sealed(1), DiskTier(job), copy_shares):
        pass
    on_disk = everything(job.checkpoint(0, 7))
    assert {name: on_disk[name] for name in three.contents} == three.contents
    verify_full(job.checkpoint(0, 7))


@pytest.mark.parametrize("sealing", [{0}, {2}, {0, 2}])
def test_before_the_last_seal_there_is_no_checkpoint(nodes: Make, sealing: set[int]) -> None:
    three = nodes(3)
    three.leaving = {0}
    three.save(7, seal=sealing)
    assert three.look(1, range(3)) == []


def test_two_leave_and_one_has_the_shares_of_all(nodes: Make, job: JobDirectory) -> None:
    three = nodes(3)
    three.leaving = {1, 2}
    attempt = three.save(7)
    for gone in three.leaving:
        three.servers[gone].close()
    assert three.look(0, [0]) == [attempt]
    for _ in drain(three.sealed(0), DiskTier(job), copy_shares):
        pass
    verify_full(job.checkpoint(0, 7))


def test_the_node_that_left_owes_nothing_and_names_who_has_it(nodes: Make) -> None:
    three = nodes(3)
    three.leaving = {2}
    three.save(7)
    assert three.sealed(2).settled and three.sealed(2).keeper == "127.0.0.1"
    assert [three.sealed(node).keeper for node in (0, 1)] == ["", ""]
    assert not three.sealed(0).settled  # it is owed to the disk
    three.leaving = set()
    three.save(8)
    assert three.sealed(2).keeper == ""


def test_a_node_that_is_about_to_leave_keeps_nothing_for_others(nodes: Make) -> None:
    """Its notice came after the save began."""
    two = nodes(2)
    two.save(7)
    attempt = attempt_of(two, 1)
    two.leaving = {0, 1}
    with pytest.raises(CheckpointRejected, match="leaves as well"):
        attempt.hand_over(soon())
    assert replicas(two.tiers[0].root) == []


def test_the_next_node_is_asked_if_one_cannot_keep_it(nodes: Make) -> None:
    three = nodes(3)
    shares = [one.share for one in three.tiers]
    first, second = (one.first for one in keepers(shares[2], shares))
    three.servers[first].close()
    three.leaving = {2}
    three.save(7)
    assert [one.seal.ranks.start for one in replicas(three.tiers[second].root)] == [2]


def test_nobody_stays(nodes: Make) -> None:
    two = nodes(2)
    two.leaving = {0, 1}
    with pytest.raises(CheckpointRejected, match="no other node stays"):
        attempt_of(two, 1).hand_over(soon())


def test_a_copy_that_takes_too_long_is_given_up(nodes: Make) -> None:
    two = nodes(2)
    two.save(7, size=3 * PIECE_BYTES)
    late = two.tiers[1].attempt("a", two.sealed(1).seal.attempt, [one.share for one in two.tiers])
    with pytest.raises(NodeLost, match="the time is up"):
        late.hand_over(time.monotonic() - 1.0)


def test_a_node_that_says_nothing_is_not_waited_for_longer(nodes: Make) -> None:
    two = nodes(2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()[:2]
        two.tiers[0].share = msgspec.structs.replace(two.tiers[0].share, host=host, port=port)
        attempt = attempt_of(two, 1)
        began = time.monotonic()
        with pytest.raises(NodeLost, match="no answer"):
            attempt.hand_over(began + 0.2)
        assert time.monotonic() < began + link.SILENCE_SECONDS


def test_what_a_node_left_here_stays_until_the_disk_has_it_or_newer(nodes: Make) -> None:
    three = nodes(3)
    three.leaving = {2}
    three.save(7)
    root = next(one.root for one in three.tiers if replicas(one.root))
    keeper = next(node for node in range(3) if three.tiers[node].root == root)
    saved = three.sealed(keeper).seal
    newer = msgspec.structs.replace(saved, step=8)
    drop_strangers(root, [], newer)
    assert [one.seal.step for one in replicas(root)] == [7]
    settle([three.tiers[keeper].share], saved.attempt)
    drop_strangers(root, [], newer)
    assert replicas(root) == []


@pytest.mark.parametrize("attempt", ["../../out", "", "a/b"])
def test_a_replica_is_called_as_an_attempt_is(nodes: Make, attempt: str) -> None:
    two = nodes(2)
    two.save(7)
    with pytest.raises(CheckpointRejected, match="no attempt is called"):
        replicate(two.tiers[0].root, two.tiers[1].share, attempt, lambda _: None)


def test_a_drain_may_be_held_for_long(
    nodes: Make, job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other node waits for the next piece as long as it takes, and is not asked anew."""
    monkeypatch.setattr(link, "SILENCE_SECONDS", 0.2)
    two = nodes(2)
    two.save(7, size=3 * PIECE_BYTES)
    copying = drain(two.sealed(0), DiskTier(job), copy_shares)
    next(copying)
    time.sleep(0.6)
    for _ in copying:
        pass
    verify_full(job.checkpoint(0, 7))
