"""Nodes that a job leaves out: their own check fails, or their workers fail again and again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_ckpt.jobdir.left_out import read_left_out
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.restart import BLAME_AT
from tests.cluster import Cluster, small_cluster
from tests.job import environment


def nodes_command(cluster: Cluster, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", "nodes", str(cluster.head.directory), *options],
        capture_output=True, text=True, timeout=60, env=environment(), check=False,
    )  # fmt: skip


@pytest.mark.hosts
def test_node_that_fails_its_check_is_left_out_until_it_is_let_in(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "1:2") as cluster:
        cluster.start("n1")
        # What the check writes cannot be written there: only on this node, as of a disk of its own.
        fault = JobDirectory.at(cluster.head.directory).node_check("n2")
        fault.mkdir()
        cluster.start("n2")
        view = cluster.head.until(lambda view: view.left_out, "a node that is left out")
        assert view.left_out[0].node == "n2" and "disk: " in view.left_out[0].why
        assert view.exit_code == 1 and any("n2 is left out" in line for line in view.warnings)
        cluster.until_step(1, 10)
        assert "this node failed its check: disk: " in cluster["n2"].output()
        assert view.left_out[0].let_in in cluster["n1"].output()
        fault.rmdir()
        done = nodes_command(cluster, "--let-in", "n2")
        assert done.returncode == 0, done.stderr
        cluster.until_training(2)
        assert nodes_command(cluster, "--let-in", "n2").returncode == 64
        cluster.finish("n1", "n2")
        cluster.assert_each_sample_once(2)
        events = [event["event"] for event in cluster.head.events()]
        assert {"node_unfit", "node_left_out", "node_let_in"} <= set(events)


@pytest.mark.hosts
def test_node_whose_workers_keep_failing_is_left_out_and_the_job_ends_without_it(
    tmp_path: Path,
) -> None:
    with small_cluster(tmp_path, "1:2") as cluster:
        cluster.start("n1", "n2")
        cluster.head.until(lambda view: view.newest_intact, "a checkpoint")
        incarnation = 0
        for _ in range(BLAME_AT):
            view = cluster.until_training(2, beyond=incarnation)
            incarnation = view.incarnation
            cluster.until_stepped(incarnation)
            victim = next(one for one in view.workers if one.node == "n2")
            os.kill(victim.pid, signal.SIGKILL)
        cluster.until_training(1, beyond=incarnation)
        view = cluster.head.view()
        assert [one.node for one in view.left_out] == ["n2"] and not view.left_out[0].takes_part
        assert "the first to fail 3 times in a row" in view.left_out[0].why
        assert "left out of the job" in next(one for one in view.nodes if one.node == "n2").message
        cluster["n2"].process.send_signal(signal.SIGTERM)
        assert cluster["n2"].wait(50) == 75, cluster.output()  # it stays preemptible
        cluster.start("n2")  # as a requeue would
        cluster.head.until(
            lambda view: any(
                one.node == "n2" and one.alive and one.message.startswith("left out of the job")
                for one in view.nodes
            ),
            "n2 to be left out again",
        )
        assert "n2  left out since" in nodes_command(cluster).stdout
        cluster.finish("n1", "n2")
        cluster.assert_each_sample_once(2)
        assert [one.node for one in read_left_out(JobDirectory.at(cluster.head.directory))] == [
            "n2"
        ]


@pytest.mark.hosts
@pytest.mark.slow
def test_head_that_fails_its_check_lets_another_node_lead(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "1:2") as cluster:
        job = JobDirectory.at(cluster.make("n1").directory)
        job.prepare()
        fault = job.node_check("n1")
        fault.mkdir()
        cluster.start("n1")
        cluster.until_step(1, 2)  # it is needed: no other node is there
        assert "continuing with n1, although left out" in cluster["n1"].output()
        cluster.start("n2")
        cluster.head.until(
            lambda view: view.supervisor.node == "n2" and view.state == "running", "n2 to lead"
        )
        fault.rmdir()
        assert nodes_command(cluster, "--let-in", "n1").returncode == 0
        cluster.until_training(2)
        cluster.finish("n1", "n2")
        cluster.assert_each_sample_once(2)
