"""ColossalAI on several nodes: saves go into their memory unless a rank reads others' files."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("colossalai", reason="ColossalAI is not installed")

from elastic_ckpt.checkpoint.verify import verify_full
from tests.cluster import MemoryCluster
from tests.integration.ranks import run_ranks
from tests.job import SCRIPTS
from tests.marks import slow
from tests.plugins import named, train_undisturbed

STEPS, EVERY = 60, 5


def boosted(root: Path, nnodes: str, setup: str) -> MemoryCluster:
    """Return a cluster that trains a setup; each rank notes the step it began at, and digests."""
    cluster = MemoryCluster(root, nnodes)
    cluster.script = SCRIPTS / "boosted.py"
    cluster.arguments = ["--setup", setup, "--steps", str(STEPS), "--every", str(EVERY)]
    cluster.arguments += ["--calm", str(cluster.calm), "--results", str(root / "results")]
    return cluster


@pytest.mark.one_torch
@pytest.mark.parametrize(
    ("setup", "tier"),
    [
        ("LowLevelZero 2 bf16", "memory"),
        slow("TorchDDP fp32", "memory"),
        slow("TorchFSDP fp32", "memory"),
        slow("Gemini bf16, in chunks", "memory"),
        slow("Hybrid tp2 bf16 (llama)", "memory"),
        slow("Hybrid dp2 zero2 bf16 (llama)", "memory"),
        slow("Hybrid pp2 bf16 (llama)", "disk"),
        slow("MoE ep2 zero1 bf16 (mixtral)", "disk"),
    ],
)
def test_a_killed_job_resumes_and_ends_as_an_undisturbed_one(
    tmp_path: Path, setup: str, tier: str
) -> None:
    with boosted(tmp_path, "2", setup) as cluster:
        cluster.start("n1", "n2")
        cluster.head.until(lambda _: len(cluster.noted("saved")) > 1, "two saves")
        victim = cluster.until_step(2, EVERY).workers[1]
        assert victim.node == "n2"
        os.kill(victim.pid, signal.SIGKILL)
        cluster.until_training(2, beyond=1)
        cluster.finish("n1", "n2")
        saved, loaded = cluster.noted("saved"), cluster.noted("loaded")
        assert saved[0]["tier"] == tier, cluster.output()  # later ones may wait for a drain
        assert len(loaded) == 1, cluster.output()
        newest = max(one["step"] for one in saved if one["step"] <= loaded[0]["step"])
        assert (loaded[0]["step"], loaded[0]["tier"]) == (newest, tier), cluster.output()
        assert not cluster.noted("drain_failed"), cluster.output()
        assert bool(cluster.noted("drained")) == (tier == "memory")
        for path in cluster.head.checkpoints():
            verify_full(path)
    undisturbed = run_ranks(train_undisturbed, 2, named(setup), 1, STEPS + 1)
    noted = [json.loads((tmp_path / f"results.{rank}").read_text()) for rank in range(2)]
    assert noted == [[loaded[0]["step"], state] for state in undisturbed]


@pytest.mark.one_torch
@pytest.mark.slow
def test_the_node_that_stays_loads_from_memory_what_both_saved(tmp_path: Path) -> None:
    """On one rank in place of two: the lost node's share is in its peer's memory."""
    with boosted(tmp_path, "1:2", "LowLevelZero 2 bf16") as cluster:
        cluster.start("n1", "n2")
        cluster.head.until(lambda _: len(cluster.noted("replicated")) >= 2, "two replicas")
        cluster.lose("n2")
        kept = max(one["step"] for one in cluster.noted("replicated"))
        cluster.until_training(1, beyond=1)
        cluster.finish("n1")
        loaded = [(one["step"] >= kept, one["tier"]) for one in cluster.noted("loaded")]
        assert loaded == [(True, "memory")], cluster.output()
        assert not cluster.noted("inexact"), cluster.output()
        for path in cluster.head.checkpoints():
            verify_full(path)
