"""What workers print is kept by incarnation and rank, and a failure shows its last lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.job import SCRIPTS, Job, environment

pytestmark = pytest.mark.one_torch

FAILING = SCRIPTS / "failing.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=False,
    )


@pytest.mark.parametrize("how", ["raise", "fault"])
def test_the_last_words_of_the_rank_that_failed_are_kept(tmp_path: Path, how: str) -> None:
    arguments = ["--step", "5", "--how", how, "--rank", "1", "--times", "1", "--say", "so it goes"]
    job = Job(tmp_path, *arguments, "--count", str(tmp_path / "count"), script=FAILING)
    with job:
        assert job.start().wait() == 0, job.output()
        assert "so it goes" in job.output()  # the terminal shows it, too
        crash = next(e["data"] for e in job.events() if e["event"] == "crash")
        assert crash["rank"] == 1
        wanted = {"raise": "ValueError: the data of this step", "fault": "in fail"}[how]
        assert wanted in " ".join(crash["tail"])
        failure = json.loads(run("status", str(job.directory), "--json").stdout)["last_failure"]
        assert failure["rank"] == 1 and failure["tail"] == crash["tail"]
        shown = " ".join(run("status", str(job.directory)).stdout.split())
        assert f"rank 1, {crash['kind']}, " in shown
        assert crash["tail"][-1][:40] in shown

        first = run("logs", str(job.directory), "--rank", "1")
        assert first.returncode == 0
        assert "== incarnation 1, rank 1\n" in first.stdout
        assert "so it goes" in first.stdout
        assert "rank 0" not in first.stdout
        last = run("logs", str(job.directory), "--last")
        assert "so it goes" not in last.stdout


def test_where_nobody_printed_it_says_so(tmp_path: Path) -> None:
    found = run("logs", str(tmp_path))
    assert found.returncode == 64
    assert "no worker has printed anything" in found.stderr


def test_a_log_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    job = Job(tmp_path, "--step", "5", "--how", "raise", "--times", "1", "--count",
              str(tmp_path / "count"), "--say", "so it goes", script=FAILING)  # fmt: skip
    (job.directory / ".elastic-ckpt").mkdir(parents=True)
    (job.directory / ".elastic-ckpt" / "logs").write_text("in the way")
    with job:
        assert job.start().wait() == 0, job.output()
        assert "so it goes" in job.output()
