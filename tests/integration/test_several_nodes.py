"""One multi-node job, with processes of this host as nodes: joining, leaving, lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import Cluster, small_cluster
from tests.job import SCRIPTS, environment


@pytest.mark.hosts
def test_two_nodes_train_as_one_job_and_end_together(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "2", nproc=2) as cluster:
        cluster.start("n1", "n2")
        cluster.finish("n1", "n2")
        cluster.assert_each_sample_once(4)
        assert cluster.head.view().newest_intact.reason == "final"


@pytest.mark.one_torch
def test_preempted_node_saves_with_all_ranks_and_the_others_continue(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "1:2") as cluster:
        cluster.start("n1", "n2")
        cluster.until_step(2, 15)
        cluster["n2"].process.send_signal(signal.SIGTERM)
        assert cluster["n2"].wait(50) == 75, cluster.output()  # well before the end of its grace
        assert "all ranks left together" in cluster["n2"].output()
        cluster.until_training(1, beyond=1)
        cluster.finish("n1")
        cluster.assert_each_sample_once(2)
        assert cluster.head.view().restarts.failures == 0
        done = sorted(p.name for p in cluster["n1"].checkpoints())
        saved = [e for e in cluster.head.events() if e["event"] == "saved"]
        assert "emergency" in {e["data"]["reason"] for e in saved}, (done, saved)


@pytest.mark.slow
def test_early_warning_of_a_member_leads_to_a_save_of_all(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "2", "--save-interval", "100000") as cluster:
        warning = tmp_path / "warning"
        cluster.start("n1")
        cluster.options += ["--notice-file", str(warning)]
        cluster.start("n2")
        cluster.until_step(2, 5)
        assert cluster["n1"].checkpoints() == []
        warning.write_text("warning of a storm\n")
        view = cluster.head.until(lambda view: view.newest_intact is not None, "an early save")
        assert view.newest_intact.reason == "manual" and view.incarnation == 1
        assert "saving early" in cluster["n2"].output()
        cluster.until_step(2, view.newest_intact.step + 5)  # and they train on


@pytest.mark.slow
@pytest.mark.hosts
def test_lost_node_is_not_counted_as_a_failure(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "1:2") as cluster:
        cluster.start("n1", "n2")
        cluster.until_step(2, 25)
        cluster.lose("n2")
        cluster.until_training(1, beyond=1)
        cluster.finish("n1")
        cluster.assert_each_sample_once(2)
        view = cluster.head.view()
        assert view.restarts.failures == 0
        crash = next(e["data"] for e in cluster.head.events() if e["event"] == "crash")
        assert (crash["kind"], crash["message"]) == ("membership", "lost node n2")


@pytest.mark.slow
@pytest.mark.hosts
def test_joining_node_grows_the_job(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "1:2") as cluster:
        cluster.start("n1")
        cluster.until_step(1, 10)
        cluster.start("n2")
        cluster.until_training(2, beyond=1)
        cluster.finish("n1", "n2")
        cluster.assert_each_sample_once(2)
        assert cluster.head.view().restarts.failures == 0


@pytest.mark.slow
@pytest.mark.hosts
def test_killed_worker_on_another_node_is_one_failure(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "2") as cluster:
        cluster.start("n1", "n2")
        victim = cluster.until_step(2, 25).workers[1]
        assert victim.node == "n2"
        os.kill(victim.pid, signal.SIGKILL)
        cluster.until_training(2, beyond=1)
        cluster.finish("n1", "n2")
        cluster.assert_each_sample_once(2)
        crashes = [e["data"] for e in cluster.head.events() if e["event"] == "crash"]
        assert [(c["rank"], c["kind"]) for c in crashes] == [(1, "signal")]
        assert cluster.head.view().restarts.failures == 1


@pytest.mark.hosts
def test_slow_rank_is_reported(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "2") as cluster:
        cluster.arguments += ["--slow", "0.05"]
        cluster.start("n1", "n2")
        view = cluster.head.until(
            lambda view: len(view.workers) == 2 and view.workers[1].slow is not None, "a slow rank"
        )
        fast, slow = view.workers
        assert (fast.slow, slow.node) == (None, "n2")
        assert slow.slow > 1.3 and slow.busy_seconds >= 0.05
        assert fast.busy_seconds < slow.busy_seconds <= slow.step_seconds
        cluster["n1"].process.send_signal(signal.SIGTERM)
        assert cluster["n1"].wait() == 75, cluster.output()
        assert cluster["n2"].wait() == 75, cluster.output()
        assert cluster.head.view().incarnation == 1


@pytest.mark.hosts
def test_hang_on_another_node_names_its_rank(tmp_path: Path) -> None:
    count = tmp_path / "count"
    with Cluster(tmp_path, "2", options=("--hang-seconds", "2")) as cluster:
        cluster.script = SCRIPTS / "failing.py"
        cluster.arguments = ["--step", "7", "--how", "hang", "--rank", "1", "--times", "1"]
        cluster.arguments += ["--count", str(count)]
        cluster.start("n1", "n2")
        cluster.finish("n1", "n2")
        crashes = [e["data"] for e in cluster.head.events() if e["event"] == "crash"]
        assert [(crash["rank"], crash["kind"]) for crash in crashes] == [(1, "hang")]
        assert "in step 7: fail (" in crashes[0]["message"]
        hangs = [event for event in cluster.head.events() if event["event"] == "hang"]
        seen = {event["node"]: list(event["data"]["stacks"]) for event in hangs}
        assert seen == {"n1": ["0"], "n2": ["1"]}


@pytest.mark.hosts
def test_node_with_another_directory_is_rejected(tmp_path: Path) -> None:
    with small_cluster(tmp_path / "a", "1:2") as cluster:
        cluster.start("n1")
        cluster.until_step(1, 5)
        stranger = cluster.make("n2")
        stranger.directory = tmp_path / "b" / "job"
        cluster.nodes["n2"] = stranger
        stranger.start()
        assert stranger.wait() == 64, cluster.output()
        assert "is not the job directory of n1" in cluster.output()


@pytest.mark.hosts
def test_node_with_other_options_is_rejected(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "1:2") as cluster:
        cluster.start("n1")
        cluster.until_step(1, 5)
        cluster.options[:2] = ["--save-interval", "11"]
        cluster.start("n2")
        assert cluster["n2"].wait() == 64, cluster.output()
        assert "n1 was given other values for --save-interval: start all" in cluster.output()
        cluster.finish("n1")


@pytest.mark.hosts
def test_nodes_with_different_worker_counts_save_on_request(tmp_path: Path) -> None:
    with small_cluster(tmp_path, "2", "--save-interval", "1000") as cluster:
        cluster.start("n1")
        cluster.nproc = 2
        cluster.start("n2")
        view = cluster.head.until(
            lambda view: len(view.workers) == 3 and all(w.step > 5 for w in view.workers), "3 ranks"
        )
        assert [worker.node for worker in view.workers] == ["n1", "n2", "n2"]
        saved_now = subprocess.run(
            [sys.executable, "-m", "elastic_ckpt", "save", str(cluster.head.directory)],
            capture_output=True, text=True, timeout=60, env=environment(), check=False,
        )  # fmt: skip
        assert saved_now.returncode == 0, saved_now.stderr + cluster.output()
        cluster.finish("n1", "n2")
        cluster.assert_each_sample_once(3)
        assert "manual" in {e["data"].get("reason") for e in cluster.head.events()}
