"""What becomes of a job whose head goes, or whose nodes do not come; nodes of this one host."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.cluster import small_cluster


@pytest.mark.parametrize("how", ["preempted", "lost"])
def test_losing_the_head_makes_the_others_ask_for_a_rerun(tmp_path: Path, how: str) -> None:
    with small_cluster(tmp_path, "1:2", "--rdzv-timeout", "15") as cluster:
        cluster.start("n1", "n2")
        cluster.until_step(2, 25)
        if how == "preempted":
            cluster["n1"].process.send_signal(signal.SIGTERM)
            assert cluster["n1"].wait() == 75, cluster.output()
        else:
            cluster.lose("n1")
        assert cluster["n2"].wait(60) == 75, cluster.output()
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
