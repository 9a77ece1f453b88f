"""Logs: the workers' output by incarnation and rank, our processes' actions by process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.job import SCRIPTS, Job, environment
from tests.marks import slow

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


@pytest.mark.parametrize("how", ["raise", slow("fault")])
def test_output_of_the_failed_rank_is_kept(tmp_path: Path, how: str) -> None:
    arguments = ["--step", "5", "--how", how, "--rank", "1", "--times", "1", "--say", "so it goes"]
    job = Job(tmp_path, *arguments, "--count", str(tmp_path / "count"), script=FAILING)
    with job:
        assert job.start().wait() == 0, job.output()
        assert "so it goes" in job.output()  # also on the terminal
        crash = next(e["data"] for e in job.events() if e["event"] == "crash")
        assert crash["rank"] == 1
        wanted = {"raise": "ValueError: the data of this step", "fault": "in fail"}[how]
        assert wanted in " ".join(crash["tail"])
        failure = json.loads(run("status", str(job.directory), "--json").stdout)["last_failure"]
        assert failure["rank"] == 1 and failure["tail"] == crash["tail"]
        shown = " ".join(run("status", "-v", str(job.directory)).stdout.split())
        assert f"rank 1, {crash['kind']}, " in shown
        assert crash["tail"][-1][:40] in shown

        first = run("logs", str(job.directory), "--rank", "1")
        assert first.returncode == 0
        assert "== incarnation 1, rank 1\n" in first.stdout
        assert "so it goes" in first.stdout
        assert "rank 0" not in first.stdout
        unknown = run("logs", str(job.directory), "--rank", "5")
        assert unknown.returncode == 64
        assert "no worker output of rank 5 in " in unknown.stderr
        assert "; there is some of rank " in unknown.stderr
        last = run("logs", str(job.directory), "--last")
        assert "so it goes" not in last.stdout
        assert "of incarnation 2" in last.stderr  # which printed nothing


def test_logs_of_a_silent_job_are_an_error(tmp_path: Path) -> None:
    found = run("logs", str(tmp_path))
    assert found.returncode == 64
    assert "no worker output" in found.stderr


@pytest.mark.slow
def test_unwritable_log_does_not_stop_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, "--step", "5", "--how", "raise", "--times", "1", "--count",
              str(tmp_path / "count"), "--say", "so it goes", script=FAILING)  # fmt: skip
    (job.directory / ".elastic-ckpt").mkdir(parents=True)
    (job.directory / ".elastic-ckpt" / "logs").write_text("in the way")
    with job:
        assert job.start().wait() == 0, job.output()
        assert "so it goes" in job.output()


def logged(job: Job, name: str) -> list[dict[str, Any]]:
    path = job.directory / ".elastic-ckpt" / "logs" / name
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def find(lines: list[dict[str, Any]], text: str) -> dict[str, Any]:
    """Return the first line that contains this text."""
    found = [line for line in lines if text in line["message"]]
    assert found, (text, [line["message"] for line in lines])
    return found[0]


def test_every_process_writes_its_log(tmp_path: Path) -> None:
    job = Job(tmp_path, "--step", "5", "--how", "raise", "--rank", "1", "--times", "1",
              "--count", str(tmp_path / "count"), script=FAILING)  # fmt: skip
    with job:
        assert job.start("--node-name", "n1").wait() == 0, job.output()
        supervisor, agent = logged(job, "supervisor-n1.jsonl"), logged(job, "agent-n1.jsonl")
        for line in supervisor:
            assert (line["process"], line["node"]) == ("supervisor", "n1")
        assert {line["pid"] for line in supervisor} == {job.process.pid}
        reported = [line["message"] for line in supervisor]
        for shown in job.output().splitlines():  # every line of the supervisor's own
            own = shown.removeprefix("elastic-ckpt: ")
            if own != shown and not re.match(r"the memory tier takes|next: |rank \d: ", own):
                assert own in reported
        find(supervisor, "to the agent: Launch incarnation=1")
        find(supervisor, "from the agent: Ended incarnation=1 kind=CRASHED rank=1")
        find(supervisor, "error, restart: within the budget")
        assert (
            reported[0].startswith("starting: ") and reported[-1] == "ended: finished, exit code 0"
        )

        assert find(agent, "rank 1 ended: ")["rank"] == 1
        assert "exit code 1, failed" in find(agent, "rank 1 ended: ")["message"]
        assert "incarnation 1" in find(agent, "rank 1 failed: ValueError")["message"]

        failed = logged(job, "000001/00001.jsonl")
        for line in failed:
            assert (line["process"], line["incarnation"], line["rank"]) == ("worker", 1, 1)
        assert "step" not in failed[0] and "torch" in failed[0]["message"]
        assert find(failed, "sealed step 4: memory")["step"] == 4
        raised = find(failed, "the script raised")
        assert (raised["level"], raised["step"]) == ("ERROR", 4)
        assert raised["error"].endswith("ValueError: the data of this step")
        assert "exit code 1, ValueError" in failed[-1]["message"]

        for path in (job.directory / ".elastic-ckpt" / "logs").rglob("*.jsonl"):
            assert str(tmp_path / "count") not in path.read_text()  # an argument can be a secret

        next_one = logged(job, "000002/00000.jsonl")
        assert "loaded epoch-0_step-4" in find(next_one, "loaded ")["message"]
        assert next_one[-1]["message"] == "the script ended with exit code 0"

        shown = run("logs", str(job.directory), "--processes").stdout.splitlines()
        assert shown[0].endswith(", UTC")
        assert "ValueError: the data of this step" in "".join(shown)
        sealed = next(line for line in shown if "sealed step 4" in line)
        assert re.match(r".{12}  rank [01]  step 4 +sealed step 4: memory, ", sealed)
        clocks = [line[:12] for line in shown[1:] if not line.startswith(" ")]
        assert clocks == sorted(clocks)

        alone = run("logs", str(job.directory), "--processes", "--rank", "1").stdout
        assert "the script raised" in alone and "rank 1 ended: " in alone
        assert "rank 0" not in alone and "supervisor" not in alone
        last = run("logs", str(job.directory), "--processes", "--last").stdout
        assert "the script raised" not in last and "Ended incarnation=2 kind=COMPLETED" in last
        printed = run("logs", str(job.directory)).stdout
        assert "the script raised" in printed and "sealed" not in printed


LOGS_ITSELF = """
import logging

import torch
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Session

logging.basicConfig(level=logging.INFO, format="mine %(name)s %(message)s")
logging.getLogger("theirs").info("hello")
data = TensorDataset(torch.ones(4, 1))
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with Session(model=model, optimizer=optimizer, save_interval=1) as session:
    for _ in session.epochs(1):
        for (batch,) in session.batches(DataLoader(data, sampler=ElasticSampler(data))):
            model(batch).mean().backward()
            optimizer.step()
print("root", [type(handler).__name__ for handler in logging.getLogger().handlers])
"""


@pytest.mark.slow
def test_logging_of_the_script_is_untouched(tmp_path: Path) -> None:
    script = tmp_path / "logs_itself.py"
    script.write_text(LOGS_ITSELF)
    with Job(tmp_path, nproc=1, script=script) as job:
        assert job.start().wait() == 0, job.output()
        output = job.output()
        mine = [line for line in output.splitlines() if line.startswith("mine")]
        assert mine == ["mine theirs hello"]
        assert "root ['StreamHandler']" in output
        find(logged(job, "000001/00000.jsonl"), "sealed step 4")


@pytest.mark.slow
def test_links_and_fifos_in_place_of_a_log_are_not_written(tmp_path: Path) -> None:
    arguments = ["--step", "99", "--how", "raise", "--count", str(tmp_path / "count")]
    with Job(tmp_path, *arguments, nproc=1, script=FAILING) as job:
        logs, secret = job.directory / ".elastic-ckpt" / "logs", tmp_path / "secret"
        (logs / "000001").mkdir(parents=True)
        secret.write_text("keep\n")
        (logs / "supervisor-n1.jsonl").symlink_to(secret)
        os.mkfifo(logs / "agent-n1.jsonl")
        (logs / "000001" / "00000.jsonl").hardlink_to(secret)
        assert job.start("--node-name", "n1").wait() == 0, job.output()
        assert secret.read_text() == "keep\n"
        found = run("logs", str(job.directory), "--processes")
        assert found.returncode == 64
        assert "no process log" in found.stderr


def test_control_characters_in_a_log_are_escaped(tmp_path: Path) -> None:
    logs = tmp_path / ".elastic-ckpt" / "logs"
    logs.mkdir(parents=True)
    evil = "\x1b]0;mine\x07\nsecond"
    line = {
        "time": "2026-01-02T03:04:05.678Z", "monotonic": 1.0, "level": evil, "process": evil,
        "node": evil, "pid": 1, "message": evil, "error": evil,
    }  # fmt: skip
    (logs / "agent-x.jsonl").write_text(json.dumps(line) + "\n")
    found = run("logs", str(tmp_path), "--processes")
    assert found.returncode == 0
    assert "03:04:05.678" in found.stdout and "\\x1b]0;mine" in found.stdout
    assert all(char.isprintable() or char == "\n" for char in found.stdout)
    assert not any(row.startswith("second") for row in found.stdout.splitlines())
