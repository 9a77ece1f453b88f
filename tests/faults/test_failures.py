"""Each class of failure on a real job: its name and how it is handled."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from tests.job import SCRIPTS, Job

FAILING = SCRIPTS / "failing.py"
CGROUPS = Path("/sys/fs/cgroup/memory")


def failing(directory: Path, how: str, *, times: int = 99, nproc: int = 1) -> Job:
    arguments = ["--step", "7", "--how", how, "--times", str(times)]
    count = ["--count", str(directory / "count")]
    job = Job(directory, *arguments, *count, nproc=nproc, script=FAILING)
    job.options = ["--memory-dir", "off"]  # a save is on the disk when the step ends
    return job


def crashes(job: Job) -> list[tuple[str, int]]:
    """Return the kind of each failure and the step that the next start resumes from."""
    found = [event["data"] for event in job.events() if event["event"] == "crash"]
    return [(crash["kind"], crash["restart_step"]) for crash in found]


def set_aside(job: Job) -> list[str]:
    return [Path(entry.path).name for entry in job.view().rejected]


@pytest.mark.one_torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "kind", "printed"),
    [
        ("raise", "error", "ValueError: the data of this step"),
        ("nan", "non-finite", "NonFiniteLoss: the loss of step 7 is nan"),
        ("fault", "fault", "killed by SIGSEGV"),
    ],
)
def test_step_that_always_fails_falls_back_once_and_then_stops(
    tmp_path: Path, how: str, kind: str, printed: str
) -> None:
    with failing(tmp_path, how) as job:
        assert job.start("--max-failures", "9").wait() == 70, job.output()
        assert crashes(job) == [(kind, 6)] * 3
        assert [name[: len("epoch-0_step-6")] for name in set_aside(job)] == ["epoch-0_step-6"]
        assert job.view().rejected[0].reason == "fell back to an older one: step 7 failed twice"
        assert job.view().message.startswith("step 7 failed 3 times")
        assert printed in job.view().message
        assert job.view().newest_intact.step == 6  # saved again before the third failure
        assert job.tiers() == []


def test_step_that_fails_twice_resumes_from_the_previous_checkpoint(tmp_path: Path) -> None:
    with failing(tmp_path, "raise", times=2, nproc=2) as job:
        assert job.start("--max-failures", "9").wait() == 0, job.output()
        assert crashes(job) == [("error", 6), ("error", 6)]
        assert "setting epoch-0_step-6 aside, resuming from epoch-0_step-4" in job.output()
        assert job.view().newest_intact.step == 20


@pytest.mark.one_torch
@pytest.mark.slow
def test_external_kills_are_not_counted_against_the_step(tmp_path: Path) -> None:
    with failing(tmp_path, "kill", times=4) as job:
        assert job.start("--max-failures", "9").wait() == 0, job.output()
        assert crashes(job) == [("signal", 6)] * 4
        assert set_aside(job) == []


@pytest.mark.one_torch
def test_hang_is_explained_before_the_workers_are_killed(tmp_path: Path) -> None:
    """Rank 0 waits for rank 1 in a collective and is not blamed."""
    with failing(tmp_path, "hang", times=1, nproc=2) as job:
        job.arguments += ["--rank", "1", "--say", "downloading"]
        assert job.start("--hang-seconds", "2").wait() == 0, job.output()
        assert crashes(job) == [("hang", 6)]
        [hang] = [event["data"] for event in job.events() if event["event"] == "hang"]
        assert (hang["rank"], hang["step"]) == (1, 7)
        assert any("fail" in frame and "failing.py" in frame for frame in hang["stacks"]["1"])
        assert hang["stacks"]["0"] and not hang["stacks"]["0"][0].startswith("no stack")
        assert 8 < hang["idle_seconds"] < 60
        [crash] = [event["data"] for event in job.events() if event["event"] == "crash"]
        assert (crash["rank"], crash["tail"]) == (1, ["downloading"])
        assert "no progress for" in crash["message"] and "failing.py" in crash["message"]


@pytest.mark.slow
def test_stopped_worker_is_continued_within_seconds_and_killed_if_it_is_stopped_again(
    tmp_path: Path,
) -> None:
    with Job(tmp_path, "--pause", "0.05", "--workers", "0", "--epochs", "9") as job:
        job.options = ["--save-interval", "10"]
        job.start().until_training()
        victim = job.view().workers[1]
        began = time.monotonic()
        os.kill(victim.pid, signal.SIGSTOP)
        step = job.view().position.step
        job.until_step(step + 20)
        assert time.monotonic() - began < 20, job.output()
        assert f"rank 1 (pid {victim.pid}) is stopped (SIGSTOP): continuing it" in job.output()
        assert job.view().incarnation == 1 and crashes(job) == []
        os.kill(victim.pid, signal.SIGSTOP)
        job.until(lambda view: view.incarnation == 2, "a restart", 20)
        [(kind, _)] = crashes(job)
        assert kind == "signal"
        assert job.view().last_failure.message == "stopped again by SIGSTOP", job.output()


@pytest.mark.one_torch
@pytest.mark.slow
@pytest.mark.parametrize("step", ["1", "9"])
def test_slow_step_is_not_a_hang(tmp_path: Path, step: str) -> None:
    """The first step compiles; later ones may take ten times the longest so far."""
    with failing(tmp_path, "pause", times=1, nproc=2) as job:
        job.arguments += ["--step", step, "--pace", "0.5" if step == "9" else "0.05"]
        assert job.start("--hang-seconds", "1").wait() == 0, job.output()
        assert crashes(job) == []


@pytest.mark.one_torch
@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not os.access(CGROUPS, os.W_OK),
    reason="a memory limit takes root and version 1 of the control groups",
)
def test_out_of_memory_kill_is_recognized(tmp_path: Path) -> None:
    group = CGROUPS / f"elastic-ckpt-test-{os.getpid()}"
    group.mkdir()
    try:
        with failing(tmp_path, "memory", times=1) as job:
            (group / "memory.limit_in_bytes").write_text(str(3 * 2**30))
            (group / "cgroup.procs").write_text(str(os.getpid()))
            try:
                job.start("--max-failures", "9")
            finally:
                (CGROUPS / "cgroup.procs").write_text(str(os.getpid()))
            assert job.wait() == 0, job.output()
            assert crashes(job) == [("host-memory", 6)]
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()
