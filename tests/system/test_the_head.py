"""What becomes of a job whose head goes: another node leads, and every sample is used once.

Hosts are network namespaces; the last tests need none. ``make test-hosts`` prints how long it took.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.catalog import list_checkpoints
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.cluster import Cluster, small_cluster
from tests.hosts import Hosts, why_not
from tests.waiting import until

SIZE, EPOCHS = 1203, 3
needs_hosts = pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts")


def make(root: Path, count: int, nnodes: str, *options: str) -> Hosts:
    arguments = ("--epochs", str(EPOCHS), "--size", str(SIZE), "--pause", "0.06")
    return Hosts(count, root, nnodes, *arguments, options=("--save-interval", "20", *options))


def own_events(cluster: Cluster, kind: str, since: float = 0.0) -> list[dict]:
    """Return the events of a kind, of all nodes."""
    found = [one for one in cluster.head.events() if one["event"] == kind]
    return [one for one in found if one["monotonic"] >= since]


def until_taken_over(cluster: Cluster, what: str, nodes: int, began: float) -> str:
    """Wait until another node leads; print the seconds, and return its name."""
    launches = [one for one in own_events(cluster, "launch") if one["monotonic"] < began]
    before = max(one["data"]["incarnation"] for one in launches)
    cluster.until_training(nodes, beyond=before)
    stepped = cluster.until_stepped(cluster.head.view().incarnation)
    taken = own_events(cluster, "head_taken_over", began)
    assert taken, cluster.output()
    lost = min(one["monotonic"] for one in own_events(cluster, "head_lost", began))
    print(
        f"\n{what}: detect {lost - began:.2f} s, new head {taken[-1]['monotonic'] - lost:.2f} s, "
        f"next step {stepped - taken[-1]['monotonic']:.2f} s; {stepped - began:.2f} s in all"
    )
    return str(taken[-1]["node"])


def assert_samples(cluster: Cluster, size: int, epochs: int) -> None:
    used = cluster.used_per_epoch()
    assert len(used) == epochs
    for counter in used:
        assert set(counter) == set(range(size))
        assert counter.total() - size < 3


@needs_hosts
def test_killed_head_is_replaced_and_joins_again(tmp_path: Path) -> None:
    with make(tmp_path, 3, "1:3") as hosts:
        hosts.start("h1", "h2", "h3")
        hosts.until_step(3, 25)
        began = time.monotonic()
        hosts.lose("h1")
        leads = until_taken_over(hosts, "the head is killed", 2, began)
        view = hosts.head.view()
        assert view.supervisor.node == leads
        hosts.start("h1")
        hosts.until_training(3, beyond=view.incarnation)
        assert f"{leads} leads this job" in hosts["h1"].output()
        hosts.finish("h1", "h2", "h3")
        assert_samples(hosts, SIZE, EPOCHS)


@needs_hosts
def test_preempted_head_leaves_the_job_to_the_others(tmp_path: Path) -> None:
    with make(tmp_path, 3, "1:3") as hosts:
        hosts.start("h1", "h2", "h3")
        hosts.until_step(3, 25)
        began = time.monotonic()
        hosts["h1"].process.send_signal(signal.SIGTERM)
        assert hosts["h1"].wait() == 75, hosts.output()
        until_taken_over(hosts, "the head is preempted", 2, began)
        hosts.finish("h2", "h3")
        assert_samples(hosts, SIZE, EPOCHS)
        assert hosts["h2"].view().restarts.failures == 0


@needs_hosts
def test_head_that_is_cut_off_lets_another_one_lead(tmp_path: Path) -> None:
    """It reaches the storage, so that its beat goes on: it has to give the job away."""
    with make(tmp_path, 3, "1:3") as hosts:
        hosts.start("h1", "h2", "h3")
        hosts.until_step(3, 25)
        began = time.monotonic()
        hosts.cut("h1")
        del hosts.nodes["h1"]
        until_taken_over(hosts, "the head is cut off", 2, began)
        hosts.finish("h2", "h3")
        assert_samples(hosts, SIZE, EPOCHS)


@pytest.mark.slow
@needs_hosts
def test_head_and_next_node_are_lost_at_once(tmp_path: Path) -> None:
    with make(tmp_path, 3, "1:3") as hosts:
        hosts.start("h1", "h2")
        hosts.until_step(2, 10)
        hosts.start("h3")
        hosts.until_training(3, beyond=1)
        hosts.until_step(3, 45)
        began = time.monotonic()
        hosts.lose("h1")
        hosts.lose("h2")
        assert until_taken_over(hosts, "head and next node are killed", 1, began) == "h3"
        hosts.finish("h3")
        assert_samples(hosts, SIZE, EPOCHS)


@needs_hosts
def test_head_that_was_cut_off_and_suspended_in_a_save_seals_nothing(tmp_path: Path) -> None:
    """All of its processes go on after another node has taken over."""
    with make(tmp_path, 3, "1:3", "--save-interval", "3") as hosts:
        hosts.start("h1", "h2", "h3")
        hosts.until_step(3, 25)
        attempts = JobDirectory.at(hosts["h1"].directory).attempts
        tree = hosts["h1"].tree()
        until(lambda: any(attempts.iterdir()), "a save", 30.0)
        for process in tree:
            process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        hosts.cut("h1")
        former = hosts.nodes.pop("h1")
        leads = until_taken_over(hosts, "the head is cut off, and suspended in a save", 2, began)
        hosts.repair("h1")
        for process in tree:
            process.send_signal(signal.SIGCONT)
        hosts.until_training(3, beyond=hosts.head.view().incarnation)
        hosts.nodes["h1"] = former
        assert f"{leads} leads now" in former.output()
        hosts.finish("h1", "h2", "h3")
        found = list_checkpoints(JobDirectory.at(former.directory))
        runs = {one.manifest.step: one.manifest.run for one in found if one.manifest}
        assert [runs[step] for step in sorted(runs)] == sorted(runs.values())
        assert_samples(hosts, SIZE, EPOCHS)


@pytest.mark.slow
def test_fewer_nodes_than_needed_wait_for_the_former_head(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "2") as cluster:
        cluster.start("n1", "n2")
        cluster.until_step(2, 15)
        before = cluster.head.view().incarnation
        cluster.lose("n1")
        second = cluster["n2"]
        second.until(lambda _: "leads from now on" in second.output(), "the new head")
        cluster.start("n1")
        cluster.until_training(2, beyond=before)
        assert "joined job, led by n2" in cluster["n1"].output()
        cluster.finish("n1", "n2")
        cluster.assert_each_sample_once(2)


def test_job_ends_with_a_head_that_leaves_too_few(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "2") as cluster:
        cluster.start("n1", "n2")
        cluster.until_step(2, 25)
        cluster["n1"].process.send_signal(signal.SIGTERM)
        for name in ("n1", "n2"):
            assert cluster[name].wait() == 75, cluster.output()


@pytest.mark.slow
def test_interrupted_head_ends_the_job(tmp_path: Path) -> None:
    """Ctrl-C comes from a person, and is for the job."""
    with small_cluster(tmp_path, "1:2") as cluster:
        cluster.start("n1", "n2")
        cluster.until_step(2, 25)
        cluster["n1"].process.send_signal(signal.SIGINT)
        for name in ("n1", "n2"):
            assert cluster[name].wait() == 75, cluster.output()
        cluster.start("n1", "n2")
        cluster.until_training(2, beyond=1)
        cluster.finish("n1", "n2")
        cluster.assert_each_sample_once(2)


@pytest.mark.slow
def test_members_find_the_new_agent_of_the_head(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "2") as cluster:
        cluster.start("n1", "n2")
        cluster.until_step(2, 15)
        cluster["n1"].agent().send_signal(signal.SIGKILL)
        cluster.until_training(2, beyond=1)
        cluster.finish("n1", "n2")
        cluster.assert_each_sample_once(2)


@pytest.mark.slow
def test_restarted_head_leads_again(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "2") as cluster:
        cluster.start("n1", "n2")
        cluster.until_step(2, 15)
        cluster["n1"].process.kill()
        cluster["n1"].process.wait(10)
        cluster["n1"].start()
        cluster.until_training(2, beyond=1)
        cluster.finish("n1", "n2")
        cluster.assert_each_sample_once(2)


def test_too_few_nodes_are_waited_for(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "2", "--rdzv-timeout", "5") as cluster:
        cluster.start("n1")
        assert cluster["n1"].wait() == 76, cluster.output()
        assert "fewer than 2 nodes for 5 s" in cluster.output()


@needs_hosts
@pytest.mark.slow
def test_former_head_that_comes_back_during_the_lease_joins_the_next_one(tmp_path: Path) -> None:
    """The endpoint that it was given names a node that does not lead."""
    with make(tmp_path, 3, "1:3", "--rdzv-timeout", "60") as hosts:
        hosts.start("h1", "h2", "h3")
        hosts.until_step(3, 10)
        before = hosts.head.view().incarnation
        hosts["h1"].process.send_signal(signal.SIGTERM)
        assert hosts["h1"].wait() == 75, hosts.output()
        hosts.start("h1")
        hosts.until_training(3, beyond=before)
        view = hosts.head.view()
        head = view.supervisor.node
        assert head != "h1"
        hosts.lose(head)
        time.sleep(1.0)
        hosts.start(head)
        hosts.until_training(3, beyond=view.incarnation)
        hosts.finish("h1", "h2", "h3")
        assert_samples(hosts, SIZE, EPOCHS)
