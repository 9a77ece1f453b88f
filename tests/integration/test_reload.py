"""SIGHUP: the job file is read again while the job trains."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.job import TINY, Job

pytestmark = pytest.mark.one_torch


def reloads(job: Job) -> list[str]:
    return [one["data"]["said"] for one in job.events() if one["event"] == "reload"]


def with_file(directory: Path) -> tuple[Job, Path]:
    job = Job(directory)
    job.script, job.arguments = TINY, ["--epochs", "1000", "--pause", "0.01"]
    job.prefix = ["setsid"]  # with a terminal a hang-up would be a notice
    file = directory / "job.toml"
    job.options = ["--config", str(file)]
    return job, file


def reload(job: Job, count: int) -> str:
    os.kill(job.view().supervisor.pid, signal.SIGHUP)
    job.until(lambda view: len(reloads(job)) == count, "the reload")
    return reloads(job)[-1]


def test_reload_changes_the_save_interval(tmp_path: Path) -> None:
    """An interval in seconds applies at once, one in steps with a new incarnation."""
    job, file = with_file(tmp_path)
    with job:
        file.write_text('save-interval = "100000s"\n')
        job.start().until_training()
        assert job.checkpoints() == []
        file.write_text('save-interval = "0.5s"\n')
        assert reload(job, 1).startswith("save interval 0.5s")
        job.until(lambda view: len(job.checkpoints()) >= 2, "saves")
        assert job.view().incarnation == 1
        file.write_text("save-interval = 50\n")
        assert reload(job, 2).startswith("save interval 50 steps")
        job.until(lambda view: view.incarnation == 2 and view.state == "running", "another one")
        began = job.view().newest_intact.step
        view = job.until(lambda view: view.newest_intact.step > began + 50, "saves by steps")
        assert view.newest_intact.step % 50 == 0
        assert view.restarts.failures == view.restarts.preemptions == 0


@pytest.mark.slow
def test_invalid_job_file_changes_nothing(tmp_path: Path) -> None:
    job, file = with_file(tmp_path)
    with job:
        file.write_text("grace = 20\n")
        job.start().until_training()
        file.write_text("grace = 20\nsave-intervall = 5\n")
        message = reload(job, 1)
        assert message.startswith("nothing changed: ") and "did you mean save-interval" in message
        file.write_text('grace = 20\nmemory-dir = "a\\u0000b"\nname = "c\\u0000"\n')
        reload(job, 2)
        (tmp_path / "loop").symlink_to("loop")
        file.write_text('dir = "loop/x"\n')
        reload(job, 3)
        file.write_text("grace = 20\nmax-failures = 7\n")
        assert reload(job, 4).endswith("other changes apply at the next start")
        job.until_step(job.view().position.step + 5)
