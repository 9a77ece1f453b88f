"""A checkpoint whose parts are in several nodes' memory: whole or not at all, to the bit."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.memory.drain import drain
from elastic_ckpt.checkpoint.memory.seal import Share
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.nodes import link
from elastic_ckpt.checkpoint.nodes.client import PIECE_BYTES, NodeMemory, settle
from elastic_ckpt.checkpoint.nodes.copies import copy_shares
from elastic_ckpt.checkpoint.nodes.replica import drop_strangers, replicas, replicate
from elastic_ckpt.checkpoint.tier import Ref, TierFull
from elastic_ckpt.checkpoint.verify import verify_full
from elastic_ckpt.errors import CheckpointRejected, NodeLost
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.progress import unwatched
from tests.node_memories import NodeMemories

Make = Callable[..., NodeMemories]


def everything(directory: Path) -> dict[str, bytes]:
    found = directory.rglob("*")
    return {str(one.relative_to(directory)): one.read_bytes() for one in found if one.is_file()}


def replicate_all(three: NodeMemories, attempt: str) -> None:
    for tier in three.tiers:
        sealed = next(one for one in tier.sealed() if one.seal.attempt == attempt)
        for share in sealed.seal.guards:
            replicate(tier.root, share, attempt, lambda _: None)


def test_every_node_brings_what_the_others_have(nodes: Make) -> None:
    three = nodes(3)
    attempt = three.save(7)
    assert three.look(0, range(3)) == [attempt]
    for node in range(3):
        reading = three.bring(node)
        assert everything(reading.path) == three.contents
        assert reading.seal.total_bytes == sum(map(len, three.contents.values()))
        reading.confirm()
        reading.close()
        assert not reading.path.exists()
    assert three.save(8)  # the second names of a load do not keep files from being written again


def test_a_node_brings_the_chunks_alone_that_its_ranks_read(
    nodes: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = nodes(2)
    two.save(7, size=4 * PIECE_BYTES)
    two.look(0, range(2))
    fetched: list[int] = []
    fetch = NodeMemory.fetch

    def counted(self: NodeMemory, attempt: str, path: str, begin: int, target) -> str:
        fetched.append(begin // PIECE_BYTES)
        return fetch(self, attempt, path, begin, target)

    monkeypatch.setattr(NodeMemory, "fetch", counted)
    reading = two.bring(0)
    name = "modeling/00001.safetensors"
    assert reading.rest is not None
    assert fetched == [0]
    reading.rest.want({name: [(2 * PIECE_BYTES + 5, 3 * PIECE_BYTES)]})
    reading.rest.bring(unwatched)
    reading.rest.settle()
    reading.confirm()
    assert fetched == [0, 2]
    wanted = slice(2 * PIECE_BYTES, 3 * PIECE_BYTES)
    assert (reading.path / name).read_bytes()[wanted] == two.contents[name][wanted]
    assert (reading.path / name).stat().st_size == len(two.contents[name])
    reading.close()


def test_all_ranks_bring_the_rest_or_none(nodes: Make) -> None:
    """Also the node that has the only large file: the others would wait for its ranks."""
    three = nodes(3)
    three.save(7, size=1000, sizes={1: 3 * PIECE_BYTES})
    three.look(0, range(3))
    for node in range(3):
        reading = three.bring(node)
        assert reading.rest is not None
        reading.rest.want(None)
        reading.rest.bring(unwatched)
        reading.rest.settle()
        reading.confirm()
        found = everything(reading.path)
        assert {name: found[name] for name in three.contents} == three.contents
        reading.close()
    three.save(8, size=1000)
    three.look(0, range(3))
    assert all(three.bring(node).rest is None for node in range(3))


def test_a_load_without_room_in_memory_is_refused(
    nodes: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = nodes(2)
    two.save(7, size=2 * PIECE_BYTES)
    two.look(0, range(2))
    monkeypatch.setattr("elastic_ckpt.checkpoint.nodes.reading.room_bytes", lambda _: 1000)
    with pytest.raises(CheckpointRejected, match="do not fit"):
        two.bring(0)


def test_a_run_on_one_node_takes_no_share_for_a_checkpoint(nodes: Make) -> None:
    """Whatever its number of ranks; a share of all ranks is one."""
    two, alone = nodes(2), nodes(1)
    two.save(7)
    whole = alone.save(7)
    for world_size in (1, 2):
        assert MemoryTier(two.tiers[0].root).candidates(world_size) == []
    assert MemoryTier(two.tiers[0].root).newest() is None
    assert [one.ref.attempt for one in MemoryTier(alone.tiers[0].root).candidates(1)] == [whole]


def test_memory_that_fails_during_a_load_has_the_checkpoint_refused(nodes: Make) -> None:
    two = nodes(2)
    two.save(7)
    two.look(0, range(2))
    (two.tiers[0].root / "brought").write_bytes(b"")
    with pytest.raises(CheckpointRejected, match="cannot be brought here"):
        two.bring(0)


def test_nothing_is_loaded_from_memory_if_a_node_has_none(nodes: Make) -> None:
    two = nodes(2)
    attempt = two.save(7)
    replicate_all(two, attempt)
    assert two.look(0, range(2)) == [attempt]
    two.tiers[1].share = msgspec.structs.replace(two.tiers[1].share, port=0)
    assert two.look(0, range(2)) == []
    assert two.look(0, [0]) == [attempt]


def test_a_checkpoint_that_not_all_nodes_have_sealed_is_none(nodes: Make) -> None:
    three = nodes(3)
    first = three.save(7)
    three.save(8, seal=[1, 2])  # the leader died before its own
    assert three.look(0, range(3)) == [first]
    assert three.look(0, [0, 2]) == []


def test_a_replica_takes_the_place_of_a_node_that_is_gone(nodes: Make) -> None:
    three = nodes(3)
    attempt = three.save(7)
    replicate_all(three, attempt)
    for gone in range(3):
        left = [node for node in range(3) if node != gone]
        assert three.look(left[0], left) == [attempt]
        reading = three.bring(left[1], leader=left[0])
        assert everything(reading.path) == three.contents
        reading.close()
    assert three.look(0, [0]) == []  # two are gone


def test_two_replicas_outlive_two_nodes(nodes: Make) -> None:
    three = nodes(3, replicas=2)
    attempt = three.save(7)
    replicate_all(three, attempt)
    for node in range(3):
        assert three.look(node, [node]) == [attempt]
        reading = three.bring(node, leader=node)
        assert everything(reading.path) == three.contents
        reading.close()


def test_every_flipped_bit_of_a_replica_is_refused(nodes: Make) -> None:
    two = nodes(2)
    attempt = two.save(7, size=PIECE_BYTES + 1000)
    replicate_all(two, attempt)
    (kept,) = replicas(two.tiers[0].root)
    (entry,) = kept.seal.files
    path = kept.generation.path / entry.path
    draws = random.Random(11)
    with open(path, "r+b", buffering=0) as file:
        for _ in range(200):
            place, bit = draws.randrange(entry.bytes), 1 << draws.randrange(8)
            byte = _at(file, place)
            _put(file, place, byte ^ bit)
            assert two.look(0, [0]) == [attempt]
            with pytest.raises(CheckpointRejected, match="damaged"):
                two.bring(0)
            _put(file, place, byte)
    two.look(0, [0])
    two.bring(0).close()


def _at(file, place: int) -> int:
    file.seek(place)
    return file.read(1)[0]


def _put(file, place: int, byte: int) -> None:
    file.seek(place)
    file.write(bytes([byte]))


@pytest.mark.parametrize("spoil", [b"", b"{", b'{"modeling/00001.safetensors": []}'])
def test_a_replica_with_damaged_digests_is_refused(nodes: Make, spoil: bytes) -> None:
    two = nodes(2)
    replicate_all(two, two.save(7))
    (kept,) = replicas(two.tiers[0].root)
    (kept.generation.slot / "digests.json").write_bytes(spoil)
    two.look(0, [0])
    with pytest.raises(CheckpointRejected, match="damaged"):
        two.bring(0)


def test_bytes_that_change_on_their_way_are_refused(
    nodes: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = nodes(2)
    two.save(7)
    two.look(0, range(2))
    fill = link.NodeLink.fill

    def flip(self: link.NodeLink, target, **options) -> bool:
        ended = fill(self, target, **options)
        if len(target) > 50_000:
            target[4711] ^= 1
        return ended

    monkeypatch.setattr(link.NodeLink, "fill", flip)
    with pytest.raises(CheckpointRejected, match="changed on its way"):
        two.bring(0)


def test_only_the_newest_replicas_of_a_share_are_kept(nodes: Make) -> None:
    two = nodes(2)
    for step in (7, 8, 9):
        attempt = two.save(step)
        replicate_all(two, attempt)
        settle([one.share for one in two.tiers], attempt)
    for tier in two.tiers:
        assert [one.seal.step for one in replicas(tier.root)] == [9, 8]


def test_replicas_of_earlier_pairs_go_once_there_is_a_newer_one(nodes: Make) -> None:
    three = nodes(3)
    replicate_all(three, three.save(7))
    attempt = three.save(8)
    root, shares = three.tiers[0].root, [one.share for one in three.tiers]
    other = next(one for one in shares[1:] if one not in three.sealed(0).seal.guards)
    made = replicate(root, other, attempt, lambda _: None)
    drop_strangers(root, [other], made.seal)
    assert [(one.seal.step, one.seal.ranks.start) for one in replicas(root)] == [(8, other.first)]


def test_a_node_knows_of_what_others_have_a_copy(nodes: Make) -> None:
    three = nodes(3)
    attempt = three.save(7)
    assert not any(one.generation.is_copied(one.seal) for one in map(three.sealed, range(3)))
    replicate_all(three, attempt)
    assert all(one.generation.is_copied(one.seal) for one in map(three.sealed, range(3)))
    three.save(8)
    assert not any(one.generation.is_copied(one.seal) for one in map(three.sealed, range(3)))


def test_a_replica_without_room_is_not_made(nodes: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    two = nodes(2)
    attempt = two.save(7)
    monkeypatch.setattr("elastic_ckpt.checkpoint.nodes.replica.room_bytes", lambda _: 1000)
    with pytest.raises(TierFull, match="needs"):
        replicate(two.tiers[0].root, two.tiers[1].share, attempt, lambda _: None)
    assert replicas(two.tiers[0].root) == []


def test_each_node_drains_its_share_and_the_leader_seals(nodes: Make, job: JobDirectory) -> None:
    three = nodes(3)
    three.save(7, size=3_000_000)
    sealed = three.sealed(0)
    for _ in drain(sealed, DiskTier(job), copy_shares):
        pass
    manifest = verify_full(job.checkpoint(0, 7))
    assert {entry.rank for entry in manifest.files} == {0, 1, 2}
    on_disk = everything(job.checkpoint(0, 7))
    assert {name: on_disk[name] for name in three.contents} == three.contents
    settle(sealed.seal.others, sealed.seal.attempt)
    assert all(three.sealed(node).settled for node in (1, 2))


def test_a_drain_takes_the_share_of_a_lost_node_from_its_replica(
    nodes: Make, job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = nodes(3)
    attempt = three.save(7)
    replicate_all(three, attempt)
    three.servers[2].close()
    for _ in drain(three.sealed(0), DiskTier(job), copy_shares):
        pass
    verify_full(job.checkpoint(0, 7))


def test_a_drain_takes_nothing_from_a_damaged_replica(nodes: Make, job: JobDirectory) -> None:
    """The disk's digests would be of the damage."""
    three = nodes(3)
    replicate_all(three, three.save(7))
    three.servers[2].close()
    for tier in three.tiers:
        for kept in replicas(tier.root):
            if kept.seal.ranks.start == 2:
                path = kept.generation.path / kept.seal.files[0].path
                path.write_bytes(b"!" + path.read_bytes()[1:])
    with pytest.raises(CheckpointRejected, match="damaged"):
        for _ in drain(three.sealed(0), DiskTier(job), copy_shares):
            pass
    assert not job.checkpoint(0, 7).exists()


@pytest.mark.parametrize("attempt", ["../../out", "0" * 16, ""])
def test_a_share_is_copied_into_no_other_attempt(
    nodes: Make, job: JobDirectory, attempt: str
) -> None:
    two = nodes(2)
    saved = two.save(7)
    with (
        NodeMemory(two.tiers[1].share) as node,
        pytest.raises(CheckpointRejected, match="another attempt"),
    ):
        node.begin_copy(saved, Ref("disk", "0.7", attempt))
        node.copied()
    assert list(job.attempts.iterdir()) == []


def test_a_replica_without_its_digests_is_refused(nodes: Make) -> None:
    two = nodes(2)
    replicate_all(two, two.save(7))
    (kept,) = replicas(two.tiers[0].root)
    (kept.generation.slot / "digests.json").unlink()
    two.look(0, [0])
    with pytest.raises(CheckpointRejected, match="damaged"):
        two.bring(0)


def test_a_drain_without_a_share_seals_nothing(nodes: Make, job: JobDirectory) -> None:
    three = nodes(3, replicas=0)
    three.save(7)
    three.servers[2].close()
    with pytest.raises(NodeLost):
        for _ in drain(three.sealed(0), DiskTier(job), copy_shares):
            pass
    assert not job.checkpoint(0, 7).exists()
    assert list(job.attempts.iterdir()) == []


def test_a_drain_that_is_given_up_ends_the_other_nodes_copies(
    nodes: Make, job: JobDirectory
) -> None:
    two = nodes(2)
    two.save(7, size=3 * PIECE_BYTES)
    copying = drain(two.sealed(0), DiskTier(job), copy_shares)
    next(copying)
    copying.close()
    assert list(job.attempts.iterdir()) == []
    limit = time.monotonic() + 20
    while not two.sealed(1).generation.clear():  # its lock goes with the connection
        assert time.monotonic() < limit, "the other node still reads its share"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "path", ["../seal.json", "/etc/passwd", "modeling/../../seal.json", "modeling/nothing", ""]
)
def test_a_node_serves_no_file_that_its_seal_does_not_list(nodes: Make, path: str) -> None:
    two = nodes(2)
    attempt = two.save(7)
    with (
        NodeMemory(two.tiers[1].share) as node,
        pytest.raises(CheckpointRejected, match="does not have these bytes"),
    ):
        node.fetch(attempt, path, 0, memoryview(bytearray(10)))


@pytest.mark.parametrize("token", ["", "0" * 32, "\u00e9" * 32])
def test_nobody_is_served_without_the_secret(nodes: Make, token: str) -> None:
    two = nodes(2)
    attempt = two.save(7)
    stranger = msgspec.structs.replace(two.tiers[1].share, token=token)
    with NodeMemory(stranger) as node, pytest.raises(NodeLost):
        node.describe(attempt)


def test_what_is_no_message_ends_the_connection_alone(nodes: Make) -> None:
    two = nodes(2)
    attempt = two.save(7)
    share = two.tiers[1].share
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\0\0\0\2{}", b""):
        with (
            socket.create_connection((share.host, share.port), timeout=10) as connection,
            suppress(OSError),  # it may have ended it already
        ):
            connection.sendall(noise)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""
    with NodeMemory(share) as node:
        assert node.describe(attempt).step == 7


def test_a_node_that_says_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "SILENCE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        share = Share(0, 1, *silent.getsockname()[:2])
        with NodeMemory(share) as node, pytest.raises(NodeLost, match="no answer"):
            node.describe("7")
