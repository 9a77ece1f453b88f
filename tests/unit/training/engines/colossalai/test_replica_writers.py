"""Replicas share out a save's files: each has one writer, and the bytes are balanced."""

import pytest

from elastic_ckpt.errors import SaveFailed
from elastic_ckpt.training.engines.colossalai import replica_writers
from elastic_ckpt.training.engines.colossalai.replica_writers import (
    SHARED_FROM_BYTES,
    ReplicaWriters,
    count_writers,
)

MB = 1024 * 1024


def writers(sizes: list[int], ranks: int) -> list[int]:
    """Who writes each file, as every rank sees it."""
    everyone = [ReplicaWriters(rank, ranks) for rank in range(ranks)]
    found = []
    for number, size in enumerate(sizes):
        says = [one.takes(f"file-{number}", size) for one in everyone]
        assert says.count(True) == 1
        found.append(says.index(True))
    return found


@pytest.mark.parametrize(
    "sizes, ranks, expected",
    [
        ([512 * MB, 1024 * MB], 2, [0, 1]),
        ([4 * MB] * 6, 3, [0, 1, 2, 0, 1, 2]),
        ([8 * MB, 2 * MB, 2 * MB, 2 * MB, 2 * MB], 2, [0, 1, 1, 1, 1]),
        ([0, SHARED_FROM_BYTES - 1, SHARED_FROM_BYTES], 2, [0, 0, 1]),
        ([4 * MB, 4 * MB], 1, [0, 0]),
    ],
)
def test_the_rank_with_the_fewest_bytes_writes(
    sizes: list[int], ranks: int, expected: list[int]
) -> None:
    assert writers(sizes, ranks) == expected


def test_rank_0_writes_what_may_differ_between_replicas() -> None:
    one = ReplicaWriters(1, 2)
    assert not one.takes("buffers", 9 * MB, shared=False)
    assert one.takes("a", 4 * MB)
    assert one.takes("b", 4 * MB)


@pytest.mark.parametrize(
    "environment, world, expected",
    [
        ({"LOCAL_WORLD_SIZE": "2"}, 2, 2),
        ({"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}, 4, 2),
        ({"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}, 4, 0),
        ({"LOCAL_WORLD_SIZE": "2"}, 4, 1),
        ({}, 4, 1),
    ],
)
def test_only_ranks_of_the_first_node_write(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], world: int, expected: int
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(replica_writers.dist, "get_world_size", lambda: world)
    assert count_writers() == expected


def compare(monkeypatch: pytest.MonkeyPatch, mine: ReplicaWriters, others: list[object]) -> None:
    def gather(everyone: list[object], one: object) -> None:
        everyone[:] = [one, *others]

    monkeypatch.setattr(replica_writers.dist, "get_world_size", lambda: 1 + len(others))
    monkeypatch.setattr(replica_writers.dist, "all_gather_object", gather)
    mine.compare()


def test_replicas_with_different_files_fail_the_save(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ReplicaWriters(0, 2)
    mine.takes("a", 4 * MB)
    with pytest.raises(SaveFailed, match=r"rank 1 .* other files"):
        compare(monkeypatch, mine, [(True, [("a", 5 * MB)])])
    with pytest.raises(SaveFailed, match="rank 1"):
        compare(monkeypatch, mine, [(True, [])])


def test_equal_files_idle_nodes_and_failed_peers_are_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = ReplicaWriters(0, 2)
    mine.takes("a", 4 * MB)
    compare(monkeypatch, mine, [(True, [("a", 4 * MB)]), (False, [])])
    compare(monkeypatch, mine, [(True, None)])
