"""Who keeps whose replica."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from elastic_ckpt.checkpoint.memory.seal import Share
from elastic_ckpt.checkpoint.nodes.pairs import guarded_by, keepers, may_hand_over, sealer


def shares(domains: str) -> list[Share]:
    return [Share(4 * number, 4, domain=domain) for number, domain in enumerate(domains)]


@pytest.mark.parametrize(
    "domains", ["aa", "ab", "aabb", "abab", "aaab", "abc", "aabbc", "aaabbb", "aaaa", "abcabc"]
)
@pytest.mark.parametrize("replicas", [0, 1, 2])
def test_each_share_has_its_number_of_replicas_on_other_nodes(domains: str, replicas: int) -> None:
    nodes = shares(domains)
    kept = [(one, other) for one in nodes for other in guarded_by(one, nodes, replicas)]
    wanted = min(replicas, len(nodes) - 1)
    assert Counter(other.first for _, other in kept) == Counter(
        {one.first: wanted for one in nodes if wanted}
    )
    assert all(one.first != other.first for one, other in kept)
    assert len({(one.first, other.first) for one, other in kept}) == len(kept)


@pytest.mark.parametrize("domains", ["ab", "aabb", "abab", "abc", "aabbc", "aaabbb", "abcabc"])
def test_the_first_replica_is_in_another_domain_where_none_has_over_half(domains: str) -> None:
    nodes = shares(domains)
    for one in nodes:
        (other,) = guarded_by(one, nodes, 1)
        assert one.domain != other.domain


@pytest.mark.parametrize("domains", ["ab", "aabb", "abab", "aaab", "abc", "aaaa", "a"])
@pytest.mark.parametrize("leaving", [{0}, {1}, {0, 1}, {0, 1, 2, 3}, {3}])
def test_each_node_that_leaves_may_ask_all_that_stay(domains: str, leaving: set[int]) -> None:
    nodes = [
        msgspec.structs.replace(one, leaves=number in leaving)
        for number, one in enumerate(shares(domains))
    ]
    staying = {one.first for one in nodes if not one.leaves}
    for one in nodes:
        if one.leaves:
            found = keepers(one, nodes)
            assert {other.first for other in found} == staying
            assert len(found) == len(staying)


@pytest.mark.parametrize("domains", ["ab", "aabb", "abab", "abc", "aabbc", "aaabbb", "abcabc"])
def test_what_leaves_goes_to_another_domain_first(domains: str) -> None:
    nodes = shares(domains)
    asked = Counter(keepers(one, nodes)[0].first for one in nodes)
    assert all(keepers(one, nodes)[0].domain != one.domain for one in nodes)
    assert max(asked.values()) == 1  # not all of them the same one


@pytest.mark.parametrize(
    ("leaving", "expected", "last"),
    [
        pytest.param(set(), False, 0, id="nobody leaves: to the disk, as before"),
        pytest.param({1}, True, 0, id="one of three"),
        pytest.param({1, 2}, True, 0, id="both but the leader's"),
        pytest.param({0}, True, 1, id="the leader's: the next one brings it to the disk"),
        pytest.param({0, 1}, False, 2, id="the leader's and another: fewer than MIN may stay"),
        pytest.param({0, 1, 2}, False, 0, id="all"),
    ],
)
def test_when_nodes_hand_over(leaving: set[int], expected: bool, last: int) -> None:
    nodes = [
        msgspec.structs.replace(one, leaves=number in leaving)
        for number, one in enumerate(shares("abc"))
    ]
    assert may_hand_over(nodes) is expected
    assert sealer(nodes[::-1]) == nodes[last]


def test_a_node_alone_keeps_nothing() -> None:
    (node,) = shares("a")
    assert guarded_by(node, [node], 2) == ()
