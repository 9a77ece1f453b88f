"""A job directory on a file server that stops answering: the notice is served all the same."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_ckpt.protocol.board import Board
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


def board_fd(pid: int) -> int:
    """Return the descriptor of a supervisor's board."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if "elastic-ckpt-board" in str(entry.readlink()):
            return int(entry.name)
    raise AssertionError("the supervisor has no board")
