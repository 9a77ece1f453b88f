"""The script that is submitted, on a real SLURM: its lines, setup, signals, GPUs of each node."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.job import TINY
from tests.slurm import Slurm, why_not
from tests.system.test_slurm import LONG, Submitted, slurm

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
__all__ = ["slurm"]  # the fixture


def wrapper(cluster: Slurm) -> str:
    """Stand in for a container's launcher: starts Python, and says what it got."""
    path = cluster.root / "launch"
    path.write_text('#!/bin/sh\necho "launched on $SLURMD_NODENAME: $MARK"\nexec "$@"\n')
    path.chmod(0o755)
    return f"{path} {sys.executable}"


def test_signal_before_the_limit_is_a_notice_without_the_submitting_environment(
    slurm: Callable[..., Slurm],
) -> None:
    cluster = slurm(requeue_exit="75,76")
    cluster.environment["SBATCH_EXPORT"] = "NONE"
    home = f"export XDG_STATE_HOME={cluster.root}/home"
    options = ["--time=2", "--signal=B:USR1@70", "--comment", 'a #"b" \\ c']
    job = Submitted(
        cluster,
        LONG,
        *options,
        setup=[home, "export MARK='from setup'"],
        **{"supervisor-python": wrapper(cluster)},
    )
    shown = cluster.run("scontrol", "write", "batch_script", job.number, "-")
    assert "#SBATCH --time=2\n#SBATCH --signal=B:USR1@70\n" in shown
    assert "#SBATCH --export=NONE  # SBATCH_EXPORT\n" in shown
    assert cluster.show(job.number)["Comment"].strip() == 'a #"b" \\ c'
    job.until_step(10)
    cluster.until(job.number, lambda seen: seen["Restarts"] == "1", "requeued", 120)
    assert job.stopped() > 10
    notices = [e["data"] for e in job.job.events() if e["event"] == "notice"]
    assert notices[0]["reason"] == "SIGUSR1"
    assert notices[-1]["reason"] == "signal before the time limit"
    assert 40 < notices[-1]["seconds"] < 120  # not the 30 s of a signal
    output = cluster.output(job.number)
    assert "SIGUSR1: saving, and asking SLURM" in output
    assert "signal before the time limit: saving, " in output
    assert "launched on n1: from setup" in output
    cluster.scancel(job.number)
    cluster.until_state(job.number, "CANCELLED")


def test_each_node_starts_a_worker_per_gpu_that_it_has(slurm: Callable[..., Slurm]) -> None:
    cluster = slurm(gpus=(2, 1), requeue_exit="75,76")
    job = Submitted(cluster, LONG, "--gpus=3", nnodes=2, nproc="auto")
    view = job.until_step(10)
    assert Counter(worker.node for worker in view.workers) == {"n1": 2, "n2": 1}
    cluster.scancel(job.number, "--batch", "--signal=USR2")
    cluster.until(job.number, lambda seen: seen["Restarts"] == "1", "requeued", 60)
    view = job.until(lambda view: view.incarnation == 2 and view.state == "running", "again", 90)
    assert Counter(worker.node for worker in view.workers) == {"n1": 2, "n2": 1}
    assert view.restarts.preemptions == 1
    cluster.scancel(job.number)
    cluster.until_state(job.number, "CANCELLED")


def test_failed_setup_ends_the_job_and_the_script_submits_by_hand(
    slurm: Callable[..., Slurm], tmp_path: Path
) -> None:
    cluster = slurm(requeue_exit="75,76")
    job = Submitted(cluster, LONG, setup="cd .\nls /no/such/module > /dev/null 2>&1\n")
    seen = cluster.until_state(job.number, "FAILED")
    assert (seen["ExitCode"], seen["Restarts"]) == ("70:0", "0")
    assert "setup failed: ls /no/such/module" in cluster.output(job.number)
    assert f"(line 2 of setup in {cluster.root}/job.toml)" in cluster.output(job.number)
    # A colleague submits the script from elsewhere, and asks for too many tasks.
    (cluster.root / "job.toml").write_text(
        f'dir = "job"\nscript = "{TINY}"\nargs = ["--epochs", 1]\nnproc = 1\n'
    )
    script = cluster.run("elastic-ckpt", "slurm", "submit", "job.toml", "--dry-run", "--", "-plow")
    (tmp_path / "job.sbatch").write_text(script)
    number = cluster.sbatch(
        f"--export=ALL,PWD={tmp_path}", "--ntasks-per-node=2", str(tmp_path / "job.sbatch")
    )
    seen = cluster.until_state(number, "COMPLETED", "FAILED")
    output = cluster.output(number)
    assert seen["JobState"] == "COMPLETED", output
    assert seen["WorkDir"] == str(cluster.root)
    assert "locked" not in output
    found = cluster.call("elastic-ckpt", "slurm", "submit", "job.toml", "--", "--test-only")
    assert found.returncode == 0 and "to start at" in found.stdout, found
