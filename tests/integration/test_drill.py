"""``elastic-ckpt drill`` on a running job."""

import json
import subprocess
import sys

import pytest

from tests.checkpoints import open_job
from tests.job import Job, environment
from tests.marks import slow

pytestmark = pytest.mark.one_torch


def drill(job, *options):
    command = [sys.executable, "-m", "elastic_ckpt", "drill", str(job.directory), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=90)


@pytest.mark.parametrize(("grace", "code"), [("60", 0), slow("0", 1)])
def test_drill_reports_whether_a_save_fits_the_grace(tmp_path, grace, code):
    with Job(tmp_path, "--epochs", "1000", "--pause", "0.02", "--interval", "10", nproc=1) as job:
        job.start("--grace", grace).until_step(12)
        job.until(lambda view: view.newest_intact and view.newest_intact.tier == "disk", "a save")
        done = drill(job, "--json")
        assert done.returncode == code, done.stderr
        found = json.loads(done.stdout)
        assert found["fits"] is (code == 0) and found["grace_seconds"] == float(grace)
        assert found["measured_seconds"] > 0.001 and found["bytes"] > 0
        saved = [e["data"] for e in job.events() if e["event"] == "saved"]
        reasons = {(one["tier"], one["reason"]) for one in saved if one["step"] == found["step"]}
        # As on a notice: not through memory, unless a save of that step is due anyway.
        due = {("memory", "interval"), ("disk", "interval")}
        assert len(reasons) == 1
        assert reasons <= (due if found["step"] % 10 == 0 else {("disk", "manual")})
        job.until(lambda view: view.workers[0].step > found["step"] + 2, "that it trains on")
        other = json.loads(drill(job, "--json", "--grace", "50").stdout)
        assert (other["fits"], other["grace_seconds"]) == (True, 50.0)


def test_drill_without_a_running_job_is_a_usage_error(tmp_path):
    job = Job(tmp_path)
    open_job(job.directory)
    done = drill(job)
    assert done.returncode == 64 and "no job is running" in done.stderr
