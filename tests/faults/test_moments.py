"""Ends and signals at awkward moments: exit code and reason are still right."""

import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.job import SCRIPTS, Job, environment, survivors
from tests.marks import slow

ODD = SCRIPTS / "odd.py"


def odd(directory: Path, *arguments: str, nproc: int = 1) -> Job:
    return Job(directory, *arguments, nproc=nproc, script=ODD)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("raise", "the very reason"), "ValueError: the very reason"),
        slow(("exit", "-1"), "exit code 255"),
        slow(("leave", "5"), "exit code 5"),
        slow(("signal", str(int(signal.SIGSEGV))), "killed by SIGSEGV"),
    ],
)
def test_first_failed_rank_is_named_with_its_reason(tmp_path, arguments, reason):
    with odd(tmp_path, *arguments, nproc=2) as job:
        assert job.start("--max-failures", "0").wait() == 70
        view = job.view()
        assert view.message == f"1 failure: rank 1 failed: {reason}", job.output()
        assert view.restarts.failures == 1


@pytest.mark.slow
def test_failed_rank_with_a_live_thread_does_not_block_the_job(tmp_path):
    with odd(tmp_path, "raise-with-thread", nproc=2) as job:
        assert job.start("--max-failures", "0").wait(40) == 70, job.output()
        assert job.view().message == "1 failure: rank 1 failed: ValueError: a thread lives on"


@pytest.mark.one_torch
@pytest.mark.slow
def test_forked_child_does_not_act_for_its_rank(tmp_path):
    with odd(tmp_path, "fork") as job:
        job.start().until_step(5)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(50) == 75, job.output()


@pytest.mark.one_torch
@pytest.mark.slow
def test_script_that_stops_on_a_notice_exits_76(tmp_path):
    with odd(tmp_path, "stop-by-itself") as job:
        job.start().until(lambda _: "up\n" in job.output(), "the script")
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(50) == 76, job.output()


@pytest.mark.slow
def test_children_and_exit_hooks_work_as_in_a_plain_script(tmp_path):
    done = tmp_path / "done"
    with odd(tmp_path, "children", str(done)) as job:
        assert job.start("--max-failures", "0").wait(60) == 0, job.output()
        assert done.exists()


@pytest.mark.one_torch
def test_repeated_signals_do_not_change_the_exit_code(tmp_path):
    with odd(tmp_path, "train") as job:
        job.start().until_step(3)
        limit = time.monotonic() + 60
        while job.process.poll() is None and time.monotonic() < limit:
            job.process.send_signal(signal.SIGTERM)
            time.sleep(0.002)
        assert job.wait(50) == 75, job.output()


@pytest.mark.one_torch
@pytest.mark.slow
def test_hangup_of_the_terminal_is_a_notice(tmp_path):
    with odd(tmp_path, "train") as job:
        pid, terminal = pty.fork()
        if pid == 0:
            os.execve(
                sys.executable,
                [sys.executable, "-m", "elastic_ckpt", "run", "--dir", str(job.directory),
                 "--nproc", "1", "--", str(ODD), "train"],
                environment(),
            )  # fmt: skip
        try:
            read_until(terminal, b"step 5\r\n")
        finally:
            os.close(terminal)
            code = end_of(pid)
        assert code == 75
        assert job.view().newest_intact.reason == "emergency"


@pytest.mark.one_torch
@pytest.mark.slow
def test_closed_output_pipe_does_not_stop_the_run(tmp_path):
    with odd(tmp_path, "train") as job:
        command = [
            sys.executable, "-m", "elastic_ckpt", "run", "--dir", str(job.directory),
            "--nproc", "1", "--", str(ODD), "train",
        ]  # fmt: skip
        job.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment()
        )
        read_until(job.process.stdout.fileno(), b"step 3\n")
        job.process.stdout.close()
        reached = job.view().position.step
        job.until_step(reached + 5)
        tree = job.tree()
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(50) == 75
        assert not survivors(tree)


@pytest.mark.one_torch
@pytest.mark.slow
def test_closed_standard_streams_do_not_alias_locks_or_boards(tmp_path):
    with odd(tmp_path, "train") as job:
        code = f"""
import os, sys
os.closerange(0, 3)
sys.argv[1:] = ["run", "--dir", {str(job.directory)!r}, "--nproc", "1", "--", {str(ODD)!r}, "train"]
from elastic_ckpt.cli.app import main
main()
"""
        job.process = subprocess.Popen([sys.executable, "-c", code], env=environment())
        job.until_step(3)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(50) == 75


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 60])
def test_temporary_directory_is_clean_after_a_run(tmp_path, monkeypatch, depth):
    # Deep paths are common on clusters, and the path of a socket is limited.
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as scratch:
        directory = Path(scratch) / ("d" * depth)
        directory.mkdir(exist_ok=True)
        monkeypatch.setenv("TMPDIR", str(directory))
        with odd(tmp_path, "train") as job:
            job.start().until_step(2)
            assert depth or list(directory.iterdir())
            job.process.send_signal(signal.SIGTERM)
            assert job.wait(50) == 75, job.output()
        # Torch keeps its compiler's cache there.
        assert not [p for p in directory.iterdir() if not p.name.startswith("torchinductor")]


@pytest.mark.one_torch
@pytest.mark.slow
def test_notice_is_served_after_the_directory_was_moved(tmp_path):
    with odd(tmp_path, "train") as job:
        job.start("--grace", "10").until_step(3)
        tree = job.tree()
        job.directory.rename(tmp_path / "elsewhere")
        time.sleep(0.6)  # the supervisor has polled for requests meanwhile
        assert job.process.poll() is None, job.output()
        job.process.send_signal(signal.SIGTERM)
        # The leader creates the directory again and seals in it.
        assert job.wait(50) == 75, job.output()
        assert len(job.checkpoints()) == 1
        assert not survivors(tree)


@pytest.mark.one_torch
@pytest.mark.slow
def test_save_request_fails_when_the_job_ends(tmp_path):
    with odd(tmp_path, "stop-by-itself") as job:
        job.start().until(lambda _: "up\n" in job.output(), "the script")
        command = [sys.executable, "-m", "elastic_ckpt", "save", str(job.directory)]
        asking = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment())
        try:
            job.until(lambda _: list(job.directory.rglob("save-*")), "the request")
            job.process.send_signal(signal.SIGTERM)
            assert job.wait(50) == 76, job.output()
            _, error = asking.communicate(timeout=50)
        finally:
            asking.kill()
        assert asking.returncode == 70
        assert "the job has ended" in error.decode()


def read_until(fd: int, text: bytes, seconds: float = 60.0) -> None:
    limit, seen = time.monotonic() + seconds, b""
    while text not in seen:
        assert time.monotonic() < limit, seen.decode()
        seen += os.read(fd, 4096)


def end_of(pid: int, seconds: float = 30.0) -> int:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("still running")
