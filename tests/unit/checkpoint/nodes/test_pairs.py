"""Who keeps whose replica."""

from __future__ import annotations

from collections import Counter

import pytest

from elastic_ckpt.checkpoint.memory.seal import Share
from elastic_ckpt.checkpoint.nodes.pairs import guarded_by


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


def test_a_node_alone_keeps_nothing() -> None:
    (node,) = shares("a")
    assert guarded_by(node, [node], 2) == ()
