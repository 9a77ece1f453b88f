"""The same script alone and under plain torchrun: SIGTERM is the notice, 75 the exit code."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from elastic_ckpt.checkpoint.catalog import newest_intact
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.job import TINY, environment, kill_tree
from tests.ports import free_port

ARGUMENTS = ("--epochs", "3", "--pause", "0.02")


def launch(directory, ranks: int, *extra: str) -> subprocess.Popen:
    if ranks == 1:
        command = [sys.executable]
    else:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
            "--master-port", str(free_port()),
        ]  # fmt: skip
    command += [str(TINY), *ARGUMENTS, "--digest", str(directory / "digest"), *extra]
    directory.mkdir(exist_ok=True)
    log = open(directory / "log", "ab")
    return subprocess.Popen(
        command, stdout=log, stderr=log,
        env=environment() | {"ELASTIC_CKPT_DIR": str(directory / "job"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait(process: subprocess.Popen, directory) -> int:
    try:
        return process.wait(120)
    except subprocess.TimeoutExpired:
        kill_tree(psutil.Process(process.pid))
        raise AssertionError((directory / "log").read_text()) from None


def wait_for_trace(directory, ranks: int, step: int) -> None:
    limit = time.monotonic() + 90
    while time.monotonic() < limit:
        counts = [
            len(path.read_text().splitlines()) if path.exists() else 0
            for path in (directory / f"trace.{rank}" for rank in range(ranks))
        ]
        if min(counts) >= step:
            return
        time.sleep(0.02)
    raise AssertionError((directory / "log").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_the_next_run_resumes(tmp_path, ranks):
    calm = tmp_path / "calm"
    assert wait(launch(calm, ranks), calm) == 0, (calm / "log").read_text()
    wild = tmp_path / "wild"
    process = launch(wild, ranks, "--trace", str(wild / "trace"))
    wait_for_trace(wild, ranks, 5)
    if ranks == 1:
        process.send_signal(signal.SIGTERM)
        assert wait(process, wild) == 75, (wild / "log").read_text()
    else:
        # To one rank alone; torchrun itself ends with 1 when a worker leaves with a code.
        workers = [p for p in psutil.Process(process.pid).children() if str(TINY) in p.cmdline()]
        os.kill(workers[-1].pid, signal.SIGTERM)
        assert wait(process, wild) == 1
        log = (wild / "log").read_text()
        assert "exitcode  : 75" in log, log
    found = newest_intact(JobDirectory.at(wild / "job"))
    assert found is not None and found.manifest.reason == "emergency"
    assert wait(launch(wild, ranks), wild) == 0, (wild / "log").read_text()
    assert (wild / "digest").read_text() == (calm / "digest").read_text()


@pytest.mark.one_torch
@pytest.mark.slow
def test_second_script_in_a_directory_is_rejected(tmp_path):
    first = launch(tmp_path, 1, "--trace", str(tmp_path / "trace"), "--epochs", "500")
    wait_for_trace(tmp_path, 1, 2)
    second = launch(tmp_path, 1)
    assert wait(second, tmp_path) == 1
    log = (tmp_path / "log").read_text()
    assert "LockHeld" in log and f"pid {first.pid}" in log
    first.terminate()
    assert wait(first, tmp_path) == 75
