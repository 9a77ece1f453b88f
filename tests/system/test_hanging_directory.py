"""A job directory on a file server that stops answering: the notice is served all the same."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_ckpt.protocol.board import Board
from tests.checkpoints import make_checkpoint, open_job
from tests.job import Job

GRACE_SECONDS = 8.0

pytestmark = pytest.mark.skipif(
    shutil.which("bindfs") is None or os.geteuid() != 0 or not os.path.exists("/dev/fuse"),
    reason="needs bindfs, /dev/fuse and root",
)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A directory that a FUSE process serves, and that process."""
    place, behind = tmp_path / "mounted", tmp_path / "behind"
    place.mkdir()
    behind.mkdir()
    server = subprocess.Popen(["bindfs", "-f", str(behind), str(place)])
    try:
        limit = time.monotonic() + 10
        while not os.path.ismount(place):
            assert server.poll() is None and time.monotonic() < limit, "bindfs does not mount"
            time.sleep(0.01)
        yield place, server
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.send_signal(signal.SIGCONT)
        subprocess.run(["umount", "-l", str(place)], check=False)
        server.kill()
        server.wait(10)


def test_ask_for_a_save_goes_out_while_the_directory_hangs(
    served: tuple[Path, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    place, server = served
    with Job(tmp_path, "--epochs", "400", "--pause", "0.02", nproc=1) as job:
        job.directory = place / "job"
        job.start("--grace", str(GRACE_SECONDS)).until_step(3)
        board = Board.open(f"/proc/{job.process.pid}/fd/{board_fd(job.process.pid)}")
        server.send_signal(signal.SIGSTOP)
        settle = time.monotonic() + 1.5  # by now each thread that touches the directory hangs
        while time.monotonic() < settle:
            assert board.flag == 0
            time.sleep(0.01)
        sent = time.monotonic()
        job.process.send_signal(signal.SIGTERM)
        while board.flag == 0:  # every rank stops before its next step
            assert time.monotonic() < sent + GRACE_SECONDS, "the ask for a save did not go out"
        asked = time.monotonic() - sent
        print(f"\nSIGTERM to the ask for a save, with a directory that hangs: {asked * 1e3:.1f} ms")
        assert board.deadline is not None
        assert asked < 1.0  # 20 ms on a quiet machine
        server.send_signal(signal.SIGCONT)  # a thread inside the kernel cannot even be killed
        assert job.wait(60) in (75, 76)


class Screen:
    """A command on a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self._fd, inner = pty.openpty()
        self.process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner)
        os.close(inner)

    def until(self, text: str, seconds: float = 30.0) -> str:
        """Return what was shown from now on up to a text."""
        limit, shown = time.monotonic() + seconds, ""
        while text not in shown:
            left = limit - time.monotonic()
            assert left > 0 and select.select([self._fd], [], [], left)[0], f"no {text!r}: {shown}"
            shown += os.read(self._fd, 65536).decode(errors="replace")
        return shown

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait(30)
        os.close(self._fd)


def test_status_that_watches_says_that_the_directory_hangs_and_continues_after_it(
    served: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    place, server = served
    job = open_job(place / "job")
    make_checkpoint(job, 7)
    screen = Screen(sys.executable, "-m", "elastic_ckpt", "status", "--watch", str(job.root))
    try:
        screen.until("step 7")
        server.send_signal(signal.SIGSTOP)
        first = screen.until("no answer for")
        shown = screen.until("no answer for")  # it counts
        assert "step 7" in first and "step 7" in shown
        server.send_signal(signal.SIGCONT)
        screen.until("step 7")
        for _ in range(2):  # the one before may have been on its way
            shown = screen.until("step 7")
        assert "no answer" not in shown
        screen.process.send_signal(signal.SIGINT)
        assert screen.process.wait(30) == 2  # a job that nothing runs
    finally:
        server.send_signal(signal.SIGCONT)
        screen.close()


def test_status_that_watches_a_directory_that_hangs_ends_on_ctrl_c(
    served: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    place, server = served
    job = open_job(place / "job")
    make_checkpoint(job, 7)
    screen = Screen(sys.executable, "-m", "elastic_ckpt", "status", "--watch", str(job.root))
    try:
        screen.until("step 7")
        server.send_signal(signal.SIGSTOP)
        screen.until("no answer for")
        screen.process.send_signal(signal.SIGINT)
        assert screen.process.wait(30) == 2
    finally:
        server.send_signal(signal.SIGCONT)
        screen.close()


def board_fd(pid: int) -> int:
    """Return the descriptor of a supervisor's board."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if "elastic-ckpt-board" in str(entry.readlink()):
            return int(entry.name)
    raise AssertionError("the supervisor has no board")
