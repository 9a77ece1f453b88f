"""What becomes of a job whose head goes, or whose nodes do not come; nodes of this one host."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.cluster import small_cluster


@pytest.mark.parametrize("how", ["preempted", "lost"])
def test_without_the_head_the_others_ask_to_be_run_again(tmp_path: Path, how: str) -> None:
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


def test_the_heads_agent_is_replaced_and_the_others_find_the_new_one(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "2") as cluster:
        cluster.start("n1", "n2")
        cluster.until_step(2, 15)
        cluster["n1"].agent().send_signal(signal.SIGKILL)
        cluster.until_training(2, beyond=1)
        cluster.finish("n1", "n2")
        cluster.assert_each_sample_once(2)


def test_a_head_that_was_killed_and_is_started_at_once_leads_again(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "2") as cluster:
        cluster.start("n1", "n2")
        cluster.until_step(2, 15)
        cluster["n1"].process.kill()
        cluster["n1"].process.wait(10)
        cluster["n1"].start()
        cluster.until_training(2, beyond=1)
        cluster.finish("n1", "n2")
        cluster.assert_each_sample_once(2)


def test_too_few_nodes_are_waited_for_and_then_the_job_can_be_run_again(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "2", "--rdzv-timeout", "5") as cluster:
        cluster.start("n1")
        assert cluster["n1"].wait() == 76, cluster.output()
        assert "fewer than 2 nodes for 5 s" in cluster.output()
