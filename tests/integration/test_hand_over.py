"""A node leaves while the disk is slow: nodes that stay keep what it has in memory."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import EPOCHS, SIZE, MemoryCluster, Node
from tests.hand_overs import INTERVAL, SLOW_DISK, is_calm, steps

pytestmark = pytest.mark.hosts


class SlowCluster(MemoryCluster):
    """Nodes whose disk is slow."""

    def __init__(self, root: Path) -> None:
        arguments = ("--epochs", str(EPOCHS), "--size", str(SIZE), "--pause", "0.12")
        super().__init__(root, "1:3", *arguments, options=("--save-interval", str(INTERVAL)))

    def make(self, name: str) -> Node:
        node = super().make(name)
        node.packages = [SLOW_DISK]
        return node


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SlowCluster]:
    with SlowCluster(tmp_path) as made:
        yield made


@pytest.mark.parametrize(
    "is_killed",
    [pytest.param(False, id="the other trains on", marks=pytest.mark.slow),
     pytest.param(True, id="all are killed")],
)  # fmt: skip
def test_node_leaves_before_the_disk_has_its_work(cluster: SlowCluster, is_killed: bool) -> None:
    """Whatever happens to the nodes that stay as long as their memory is there: nothing is lost
    that was said to be saved, and the drain is made up for."""
    cluster.start("n1", "n2")
    cluster.head.until(lambda view: is_calm(cluster, view), "a drain to the slow disk")
    cluster["n2"].process.send_signal(signal.SIGTERM)
    assert cluster["n2"].wait(50) == 75, cluster.output()
    drained = steps(cluster, "drained")
    saved = cluster.noted("saved")[-1]
    step = saved["step"]
    assert (saved["reason"], saved["tier"]) == ("emergency", "memory"), cluster.output()
    assert step not in drained
    assert f"step {step} is in the memory of the nodes that stay" in cluster["n2"].output()
    assert not cluster["n2"].tiers()
    if is_killed:
        cluster.lose("n1")
        assert step not in steps(cluster, "drained")
        cluster.start("n1")
    cluster.until_training(1, beyond=1)
    loaded = cluster.noted("loaded")[-1]
    assert (loaded["step"], loaded["tier"]) == (step, "memory"), cluster.output()
    cluster.head.until(lambda _: step in steps(cluster, "drained"), "the drain, which is owed")
    cluster.finish("n1")
    cluster.assert_each_sample_once(2)


@pytest.mark.slow
def test_two_of_three_leave_at_once(cluster: SlowCluster) -> None:
    """By way of the one that stays, or of the disk if their notices come apart: in either case the
    job goes on where they stopped."""
    cluster.start("n1", "n2", "n3")
    cluster.until_training(3)
    before = len(cluster.noted("saved"))
    cluster.head.until(
        lambda view: len(cluster.noted("saved")) > before and is_calm(cluster, view), "a drain"
    )
    for name in ("n2", "n3"):
        cluster[name].process.send_signal(signal.SIGTERM)
    assert [cluster[name].wait(60) for name in ("n2", "n3")] == [75, 75], cluster.output()
    saved = cluster.noted("saved")[-1]
    cluster.until_training(1, beyond=cluster.head.view().incarnation - 1)
    cluster.head.until(lambda _: cluster.noted("loaded")[-1]["step"] == saved["step"], "a load")
    cluster.finish("n1")
    cluster.assert_each_sample_once(3)


@pytest.mark.slow
def test_no_node_that_stays_answers_so_the_disk_gets_it(cluster: SlowCluster) -> None:
    """The ranks have the state until it is sealed somewhere."""
    cluster.start("n1", "n2")
    cluster.head.until(lambda view: is_calm(cluster, view), "a drain to the slow disk")
    cluster["n1"].process.send_signal(signal.SIGSTOP)
    try:
        cluster["n2"].process.send_signal(signal.SIGTERM)
        cluster["n2"].until(
            lambda _: cluster.noted("saved")[-1]["reason"] == "emergency", "an emergency save"
        )
    finally:
        cluster["n1"].process.send_signal(signal.SIGCONT)
    assert cluster.noted("saved")[-1]["tier"] == "disk", cluster.output()
    assert cluster["n2"].wait(50) == 75, cluster.output()
    assert "saving to the disk instead" in cluster["n1"].output()
    cluster.until_training(1, beyond=1)
    cluster.finish("n1")
    cluster.assert_each_sample_once(2)
