"""The supervisor as a container's first process: PID 1 of a PID namespace."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.job import Job, survivors

LONG = ("--epochs", "1000", "--pause", "0.01")

pytestmark = [
    pytest.mark.one_torch,
    pytest.mark.skipif(os.geteuid() != 0, reason="a PID namespace needs root"),
]


def contained(directory: Path, *arguments: str) -> Job:
    """Return a job in its own PID and mount namespace, which ends with its first process."""
    job = Job(directory, *arguments)
    enter = 'mount -t tmpfs -o size=256m tmpfs /dev/shm; exec "$@"'
    job.prefix = [
        "unshare", "--fork", "--pid", "--mount-proc", "--propagation", "private", "--kill-child",
        "sh", "-ec", enter, "sh",
    ]  # fmt: skip
    return job


def first_process(job: Job) -> psutil.Process:
    """Return PID 1, by its number outside."""
    limit = time.monotonic() + 20
    while not (children := job.supervisor().children()):
        assert time.monotonic() < limit, "no process started"
        time.sleep(0.01)
    return children[0]


def training(job: Job) -> psutil.Process:
    """Return PID 1 of a training job; its files are visible here, its pids are not."""
    job.start("--save-interval", "5")
    job.until(lambda view: view.newest_intact is not None, "a save")
    return first_process(job)


def test_sigterm_to_pid_1_saves_and_ends_all_processes(tmp_path: Path) -> None:
    with contained(tmp_path, *LONG) as job:
        init = training(job)
        tree = init.children(recursive=True)
        assert len(tree) > 3
        init.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()
        assert not survivors(tree)
        assert job.view().state == "preempted"
        assert job.tiers() == []


@pytest.mark.slow
def test_pid_1_reaps_orphans(tmp_path: Path) -> None:
    """As after ``docker exec``: the shell ends, and its children become PID 1's."""
    with contained(tmp_path, *LONG) as job:
        init = training(job)
        enter = ["nsenter", "-t", str(init.pid), "--pid", "--mount", "setsid", "sh", "-c"]
        orphans = "sleep 0.3 & sleep 0.3 & setsid sleep 0.3 &"
        subprocess.run([*enter, orphans], check=True, timeout=20)
        strangers = [p for p in init.children() if p.name() in ("sleep", "sh", "setsid")]
        assert len(strangers) == 3
        gone, left = psutil.wait_procs(strangers, timeout=30)
        assert (len(gone), left) == (3, []), [p.status() for p in left]
        # Its own children are reaped by their parents: the job still counts a crash once.
        agent = next(p for p in init.children() if "agent" in " ".join(p.cmdline()))
        agent.send_signal(signal.SIGKILL)
        job.until(lambda view: view.restarts.failures == 1 and view.state == "running", "again")
        init.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()


@pytest.mark.slow
def test_killed_pid_1_takes_all_processes_and_the_next_container_resumes(tmp_path: Path) -> None:
    with contained(tmp_path, *LONG) as job:
        init = training(job)
        tree = init.children(recursive=True)
        step = job.view().newest_intact.step
        init.send_signal(signal.SIGKILL)
        job.wait()
        assert not survivors(tree)
        again = training(job)
        job.until(lambda view: view.newest_intact.step > step, "it resumes")
        assert job.view().incarnation == 2
        again.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()
