"""What becomes of a job whose head goes, or whose nodes do not come; nodes of this one host."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.cluster import Cluster, small_cluster


def events(cluster: Cluster, name: str, kind: str) -> list[dict]:
    """Return a node's journal events of a kind."""
    return [one for one in cluster[name].events() if one["event"] == kind and one["node"] == name]


def test_next_node_leads_when_the_head_is_killed(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "1:3") as cluster:
        cluster.start("n1", "n2", "n3")
        cluster.until_step(3, 15)
        before = cluster.head.view().incarnation
        cluster.lose("n1")
        cluster.until_training(2, beyond=before)
        assert events(cluster, "n2", "head_taken_over"), cluster.output()
        assert cluster["n2"].view().supervisor.node == "n2"
        cluster.finish("n2", "n3")
        cluster.assert_each_sample_once(3)


def test_preempted_head_leaves_the_job_to_the_others_and_joins_them_again(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "1:3") as cluster:
        cluster.start("n1", "n2", "n3")
        cluster.until_step(3, 15)
        before = cluster.head.view().incarnation
        cluster["n1"].process.send_signal(signal.SIGTERM)
        assert cluster["n1"].wait() == 75, cluster.output()
        cluster.until_training(2, beyond=before)
        assert events(cluster, "n2", "head_taken_over"), cluster.output()
        cluster.start("n1")
        cluster.until_training(3, beyond=before + 1)
        assert "n2 leads this job" in cluster["n1"].output()
        cluster.finish("n1", "n2", "n3")
        cluster.assert_each_sample_once(3)


def test_interrupted_head_ends_the_job(tmp_path: Path) -> None:
    """Ctrl-C comes from a person, and is for the job."""
    with small_cluster(tmp_path, "1:2") as cluster:
        cluster.start("n1", "n2")
        cluster.until_step(2, 25)
        cluster["n1"].process.send_signal(signal.SIGINT)
        for name in ("n1", "n2"):
            assert cluster[name].wait() == 75, cluster.output()
        cluster.start("n1", "n2")
        cluster.finish("n1", "n2")
        cluster.assert_each_sample_once(2)


def test_members_find_the_new_agent_of_the_head(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "2") as cluster:
        cluster.start("n1", "n2")
        cluster.until_step(2, 15)
        cluster["n1"].agent().send_signal(signal.SIGKILL)
        cluster.until_training(2, beyond=1)
        cluster.finish("n1", "n2")
        cluster.assert_each_sample_once(2)


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
