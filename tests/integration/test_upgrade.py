"""The package is upgraded, or removed, while a job runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import elastic_ckpt
from tests.job import SCRIPTS, Job

pytestmark = pytest.mark.one_torch


def test_job_restarts_and_ends_with_the_code_that_it_started_with(tmp_path: Path) -> None:
    packages, calm = tmp_path / "packages", tmp_path / "calm"
    installed = packages / "elastic_ckpt"
    shutil.copytree(Path(elastic_ckpt.__file__).parent, installed)
    arguments = ["--epochs", "2", "--size", "200", "--pause", "0.05", "--calm", str(calm)]
    arguments += ["--trace", str(tmp_path / "trace")]
    with Job(tmp_path / "run", *arguments, nproc=1, script=SCRIPTS / "steady.py") as job:
        job.prefix = ["env", "-C", str(tmp_path), f"PYTHONPATH={packages}"]
        job.options = ["--save-interval", "10"]
        job.start().until_step(12)
        shutil.rmtree(installed)
        [worker] = job.workers()
        worker.kill()
        job.until(lambda view: view.incarnation == 2 and bool(view.workers), "a restart")
        calm.touch()
        assert job.wait() == 0, job.output()
        assert "Traceback" not in job.output()
        assert "next: nothing is left to do" in job.output()
