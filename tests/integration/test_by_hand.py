"""``status`` on another machine, where only the files are visible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from elastic_ckpt.cli.status.view import StatusView
from elastic_ckpt.jobdir.heartbeat import Heartbeat, write_heartbeat
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.job import Job, environment

ELSEWHERE = ["unshare", "--fork", "--pid", "--mount-proc"]  # where pids mean other processes

pytestmark = [
    pytest.mark.one_torch,
    pytest.mark.skipif(os.geteuid() != 0, reason="a PID namespace needs root"),
]


def status(job: Job) -> StatusView:
    command = [*ELSEWHERE, sys.executable, "-m", "elastic_ckpt", "status", "--json"]
    found = subprocess.run(
        [*command, str(job.directory)], capture_output=True, env=environment(), timeout=30
    )
    view = msgspec.json.decode(found.stdout, type=StatusView)
    assert found.returncode == view.exit_code
    return view


def test_status_from_another_host_reads_files_only(tmp_path: Path) -> None:
    with Job(tmp_path, "--epochs", "1000", "--pause", "0.01") as job:
        job.start("--save-interval", "10").until_step(40)
        heart = job.directory / ".elastic-ckpt" / "nodes"
        job.until(lambda view: any(heart.glob("*.beat")), "a heartbeat")
        view = status(job)
        assert (view.state, view.workers, view.exit_code) == ("running", [], 0)
        assert "seen from another host; last heartbeat of" in view.message
        assert view.supervisor.alive is None and view.supervisor.last_beat_seconds < 30
        assert view.newest_intact is not None
        [beat] = heart.glob("*.beat")
        job.supervisor().suspend()  # or its next heartbeat replaces the ones below
        known = JobDirectory.at(job.directory)
        write_heartbeat(known, beat.stem, Heartbeat(json.loads(beat.read_text())["wall"], 3, 77, 5))
        view = status(job)
        assert (view.position.epoch, view.position.step) == (3, 77)
        write_heartbeat(known, beat.stem, Heartbeat(1e9, 3, 77, 5))
        view = status(job)
        assert view.exit_code == 1 and view.warnings[0].endswith("it may be dead")


@pytest.mark.slow
def test_ended_job_looks_the_same_from_another_host(tmp_path: Path) -> None:
    with Job(tmp_path, "--epochs", "1") as job:
        assert job.start().wait() == 0, job.output()
        here, there = job.view(), status(job)
        assert (there.state, there.message) == (here.state, here.message) == (
            "finished", "finished",
        )  # fmt: skip
        assert there.newest_intact.step == here.newest_intact.step
