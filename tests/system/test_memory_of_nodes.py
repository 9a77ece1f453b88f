"""Saves into the memory of several hosts: loaded from there, drained by each, whole or not at all.

Every host has its own ``/dev/shm``, which goes with it as with a machine.
"""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.verify import verify_full
from tests.cluster import Node
from tests.hand_overs import INTERVAL, SLOW_DISK, is_calm, steps
from tests.hosts import Hosts, why_not

SIZE = 1203
RARE = ("--save-interval", "40")  # between two saves a busy machine can make the replicas of one
pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts")


class SlowHosts(Hosts):
    """Hosts whose disk is slow."""

    def make(self, name: str) -> Node:
        node = super().make(name)
        node.packages = [SLOW_DISK]
        return node


def make(root: Path, count: int, nnodes: str, *options: str) -> Hosts:
    arguments = ("--epochs", "2", "--size", str(SIZE), "--pause", "0.06")
    return Hosts(count, root, nnodes, *arguments, options=("--save-interval", "10", *options))


def events(hosts: Hosts, kind: str) -> list[dict]:
    """Return the data of the head's events of a kind, in order."""
    found = [one for one in hosts.head.events() if one["event"] == kind]
    return [one["data"] for one in found if not one["data"].get("follows")]


def shared_memory(hosts: Hosts, name: str) -> str:
    return hosts.inside(name, "sh", "-c", "ls /dev/shm | grep elastic-ckpt-0- || true")


def replicated(hosts: Hosts, nodes: int) -> list[int]:
    """Return the steps of which each node's share is in a peer's memory."""
    every = [one for one in hosts.head.events() if one["event"] == "replicated"]
    counts = Counter(one["data"]["step"] for one in every)
    return [step for step, count in counts.items() if count == nodes]


def assert_newest_was_loaded(hosts: Hosts, kept: list[int]) -> None:
    """The one load was of at least the newest step that was ``kept``, and from memory; on a busy
    machine a later step may be on the disk before its replicas are complete."""
    [loaded] = events(hosts, "loaded")
    assert loaded["step"] >= max(kept), hosts.output()
    assert loaded["tier"] == "memory" or loaded["step"] not in kept, hosts.output()


def assert_used_once(hosts: Hosts, ranks: int) -> None:
    for used in hosts.used_per_epoch():
        assert set(used) == set(range(SIZE))
        assert used.total() - SIZE < ranks


def test_saves_go_to_memory_and_each_host_drains_its_share(tmp_path: Path) -> None:
    with make(tmp_path, 2, "2") as hosts:
        hosts.start("h1", "h2")
        hosts.until_step(2, 25)
        assert shared_memory(hosts, "h1") and shared_memory(hosts, "h2")
        worker = hosts["h2"].workers()[0]
        worker.send_signal(signal.SIGKILL)
        hosts.until_training(2, beyond=1)
        hosts.finish("h1", "h2")

        saved = events(hosts, "saved")
        assert saved[0]["tier"] == "memory"  # later ones go to the disk if a drain takes long
        loaded = events(hosts, "loaded")
        assert len(loaded) == 1, hosts.output()
        before = [one for one in saved if one["step"] <= loaded[0]["step"]]
        newest = max(before, key=lambda one: one["step"])
        assert (loaded[0]["step"], loaded[0]["tier"]) == (newest["step"], newest["tier"])
        assert events(hosts, "drained")
        assert not events(hosts, "drain_failed"), hosts.output()
        assert_used_once(hosts, 2)
    for path in hosts.head.checkpoints():
        verify_full(path)


@pytest.mark.slow
def test_a_host_that_vanishes_takes_its_share_with_it(tmp_path: Path) -> None:
    with make(tmp_path, 3, "2", "--rdzv-timeout", "30", "--replicas", "0") as hosts:
        hosts.start("h1", "h2")
        hosts.until_step(2, 25)
        hosts.head.until(lambda view: view.newest_on_disk is not None, "a checkpoint on the disk")
        hosts.lose("h2")
        hosts.start("h3")
        hosts.until_training(2, beyond=1)
        hosts.finish("h1", "h3")
        loaded = events(hosts, "loaded")
        assert [one["tier"] for one in loaded] == ["disk"], hosts.output()
        assert_used_once(hosts, 2)
    for path in hosts.head.checkpoints():
        verify_full(path)


@pytest.mark.slow
def test_a_host_is_preempted_while_memory_is_drained(tmp_path: Path) -> None:
    with make(tmp_path, 2, "1:2", "--rdzv-timeout", "30") as hosts:
        hosts.start("h1", "h2")
        hosts.until_step(2, 25)
        hosts["h2"].process.send_signal(signal.SIGTERM)
        assert hosts["h2"].wait() == 75, hosts.output()
        hosts.until_training(1, beyond=1)
        hosts.finish("h1")
        assert_used_once(hosts, 2)
        assert "emergency" in [one["reason"] for one in events(hosts, "saved")]
    for path in hosts.head.checkpoints():
        verify_full(path)


@pytest.mark.parametrize(
    ("nnodes", "joins"), [("2", ["h3"]), pytest.param("1:2", [], marks=pytest.mark.slow)]
)
def test_the_share_of_a_host_that_vanishes_is_in_its_peers_memory(
    tmp_path: Path, nnodes: str, joins: list[str]
) -> None:
    """Nothing is read from the disk, and nothing is lost that was sealed."""
    with make(tmp_path, 3, nnodes, "--rdzv-timeout", "30", *RARE) as hosts:
        hosts.start("h1", "h2")
        hosts.head.until(lambda _: len(replicated(hosts, 2)) > 0, "replicas of a step")
        kept = replicated(hosts, 2)
        hosts.lose("h2")
        hosts.start(*joins)
        hosts.until_training(1 + len(joins), beyond=1)
        hosts.finish("h1", *joins)
        assert_newest_was_loaded(hosts, kept)
        assert_used_once(hosts, 2)
    for path in hosts.head.checkpoints():
        verify_full(path)


def test_what_the_lost_head_had_in_memory_is_in_its_peers(tmp_path: Path) -> None:
    """The next node leads, and goes on from memory: the head's share is there as a replica."""
    with make(tmp_path, 3, "2:3", "--rdzv-timeout", "60", *RARE) as hosts:
        hosts.start("h1", "h2", "h3")
        hosts.until_training(3)
        hosts.head.until(lambda _: len(replicated(hosts, 3)) > 0, "replicas of a step")
        kept = replicated(hosts, 3)
        hosts.lose("h1")
        hosts.until_training(2, beyond=1)
        hosts.finish("h2", "h3")
        assert_newest_was_loaded(hosts, kept)
        assert_used_once(hosts, 3)
    for path in hosts.head.checkpoints():
        verify_full(path)


@pytest.mark.slow
def test_a_preempted_head_leaves_before_the_disk_has_its_work(tmp_path: Path) -> None:
    """The next host has the last seal: it leads at once, and has all shares drained."""
    arguments = ("--epochs", "2", "--size", str(SIZE), "--pause", "0.12")
    options = ("--save-interval", str(INTERVAL))
    with SlowHosts(3, tmp_path, "1:3", *arguments, options=options) as hosts:
        hosts.start("h1", "h2", "h3")
        hosts.until_training(3)
        before = len(events(hosts, "saved"))
        hosts.head.until(
            lambda view: len(events(hosts, "saved")) > before and is_calm(hosts, view), "a drain"
        )
        hosts["h1"].process.send_signal(signal.SIGTERM)
        assert hosts["h1"].wait(50) == 75, hosts.output()
        saved = events(hosts, "saved")[-1]
        step = saved["step"]
        assert (saved["reason"], saved["tier"]) == ("emergency", "memory"), hosts.output()
        assert step not in steps(hosts, "drained")
        assert f"step {step} is in the memory of the nodes that stay" in hosts["h1"].output()
        assert not shared_memory(hosts, "h1")
        hosts.until_training(2, beyond=hosts.head.view().incarnation - 1)
        hosts.head.until(lambda _: events(hosts, "loaded")[-1]["step"] == step, "a load")
        assert events(hosts, "loaded")[-1]["tier"] == "memory", hosts.output()
        hosts.head.until(lambda _: step in steps(hosts, "drained"), "the drain, which is owed")
        hosts.finish("h2", "h3")
        assert_used_once(hosts, 3)
        said = [hosts[name].output() for name in ("h2", "h3")]
        (led,) = [one for one in said if "leads from now on, in place of" in one]
        assert f"step {step} of an earlier run is in memory: bringing it to the disk" in led
    for path in hosts.head.checkpoints():
        verify_full(path)
