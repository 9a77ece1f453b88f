"""A night of a job in a few minutes: a dozen different disturbances."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from elastic_ckpt.cli.status.view import StatusView, gather
from elastic_ckpt.jobdir.paths import JobDirectory

TRAIN = Path(__file__).with_name("train.py")
PATIENCE_SECONDS = 90.0
HANG_SECONDS = 4


class Night:
    """A job and its supervisor, with all files in one folder.

    Attributes:
        directory: the job directory.
        done: the disturbances so far, in order.
    """

    def __init__(self, folder: Path, steps_between: int) -> None:
        """
        Args:
            steps_between: steps from one disturbance to the next.
        """
        self.directory = folder / "gpt"
        self.done: list[str] = []
        self.log = folder / "terminal.log"
        self._steps_between = steps_between
        self._trouble = folder / "trouble"
        self._trouble.mkdir(parents=True)
        self._script = shutil.copy(TRAIN, folder / "train.py")
        self._process: subprocess.Popen[bytes] | None = None

    # -- the job ------------------------------------------------------------------------------

    def start(self, nproc: int = 2, epochs: int = 100) -> None:
        """Start the supervisor, as a user, systemd or SLURM does."""
        command = [
            sys.executable, "-m", "elastic_ckpt", "run", "--dir", str(self.directory),
            "--nproc", str(nproc), "--node-name", "node0", "--save-interval", "20",
            "--max-failures", "12", "--hang-seconds", str(HANG_SECONDS), "--keep-last", "4",
            "--", str(self._script), "--epochs", str(epochs), "--trouble", str(self._trouble),
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def view(self) -> StatusView:
        """Return what ``status`` shows."""
        return gather(JobDirectory.at(self.directory))

    def until(self, condition: Callable[[StatusView], bool], what: str) -> StatusView:
        """Wait for a condition, bounded."""
        limit = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < limit:
            if self.directory.exists():
                view = self.view()
                if condition(view):
                    return view
            time.sleep(0.1)
        last = self.log.read_text()[-3000:]
        raise AssertionError(f"not within {PATIENCE_SECONDS:.0f} s: {what}\n{last}")

    def trains(self, incarnation: int) -> StatusView:
        """Wait until this incarnation has trained for a while."""

        first: list[int] = []

        def does(view: StatusView) -> bool:
            if view.state != "running" or view.incarnation < incarnation or not view.workers:
                return False
            first.append(min(worker.step for worker in view.workers))
            return first[-1] >= first[0] + self._steps_between

        return self.until(does, f"incarnation {incarnation} trains")

    def wait(self) -> int:
        """Wait for the supervisor, and return its exit code."""
        if self._process is None:
            raise AssertionError("the job is not running")
        return self._process.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        """Kill all processes of the job."""
        if self._process is not None and self._process.poll() is None:
            found = [psutil.Process(self._process.pid)]
            found += found[0].children(recursive=True)
            for one in found:
                with contextlib.suppress(psutil.Error):
                    one.kill()
            self._process.wait(10)

    # -- the disturbances -------------------------------------------------------------------

    def pass_by(self) -> None:
        """Apply all disturbances, and wait until the job trains again."""
        self.start()
        for number, (what, happens) in enumerate(self._disturbances(), start=1):
            view = self.trains(number)
            happens(view)
            self.done.append(what)
        self.trains(len(self.done) + 1)

    def _disturbances(self) -> list[tuple[str, Callable[[StatusView], None]]]:
        return [
            ("SIGKILL to rank 1", self._kill_rank),
            ("SIGTERM to the supervisor, rerun", self._notice),
            ("a loss of nan", lambda _: self._make("nan")),
            ("SIGKILL to the supervisor, rerun", self._kill_supervisor),
            ("a rank that raises", lambda _: self._make("raise")),
            ("SIGTERM, rerun on three ranks", lambda view: self._notice(view, nproc=3)),
            ("a rank that hangs", lambda _: self._make("hang")),
            ("SIGTERM, rerun on two ranks", self._notice),
            ("SIGTERM, a flipped bit, rerun", self._flip_bit),
            ("SIGKILL to the agent", self._kill_agent),
            ("SIGUSR1 to the supervisor, rerun", self._signal),
            ("SIGKILL to rank 0", lambda view: self._kill_rank(view, 0)),
        ]

    def _kill_rank(self, view: StatusView, rank: int = 1) -> None:
        os.kill(next(one.pid for one in view.workers if one.rank == rank), signal.SIGKILL)

    def _notice(self, view: StatusView, nproc: int = 2) -> None:
        self.leave(signal.SIGTERM)
        self.start(nproc)

    def _signal(self, view: StatusView) -> None:
        self.leave(signal.SIGUSR1)
        self.start()

    def leave(self, number: int = signal.SIGTERM) -> None:
        """Send a notice, and wait until the job has saved and exited."""
        if self._process is None:
            raise AssertionError("the job is not running")
        self._process.send_signal(number)
        code = self.wait()
        if code != 75:
            raise AssertionError(f"exited with {code}:\n{self.log.read_text()[-3000:]}")

    def _kill_supervisor(self, view: StatusView) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE_SECONDS)
        self.start()

    def _kill_agent(self, view: StatusView) -> None:
        workers = {one.pid for one in view.workers}
        if self._process is not None:
            for child in psutil.Process(self._process.pid).children():
                below = {one.pid for one in child.children(recursive=True)}
                if workers <= below:
                    child.kill()

    def _flip_bit(self, view: StatusView) -> None:
        self.leave(signal.SIGTERM)
        newest = self.view().newest_intact
        if newest is None:
            raise AssertionError("nothing was saved")
        model = max(Path(newest.path, "modeling").iterdir(), key=lambda path: path.stat().st_size)
        data = bytearray(model.read_bytes())
        data[len(data) // 2] ^= 1
        model.write_bytes(data)
        self.start()

    def _make(self, trouble: str) -> None:
        (self._trouble / trouble).touch()
