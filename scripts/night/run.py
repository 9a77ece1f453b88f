"""One night of a job, in a few minutes: a dozen disturbances, each of another kind."""

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
    """A job below ``place`` and, while it runs, its supervisor.

    Attributes:
        directory: the job directory.
        told: what was done to it, in order.
    """

    def __init__(self, place: Path, steps_between: int) -> None:
        """
        Args:
            steps_between: that it trains from one disturbance to the next.
        """
        self.directory = place / "gpt"
        self.told: list[str] = []
        self.log = place / "terminal.log"
        self._steps_between = steps_between
        self._trouble = place / "trouble"
        self._trouble.mkdir(parents=True)
        self._script = shutil.copy(TRAIN, place / "train.py")
        self._process: subprocess.Popen[bytes] | None = None

    # -- the job ------------------------------------------------------------------------------

    def start(self, nproc: int = 2, epochs: int = 100) -> None:
        """Run it, as a person, systemd or SLURM does."""
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
        """What ``status`` knows."""
        return gather(JobDirectory.at(self.directory))

    def until(self, condition: Callable[[StatusView], bool], what: str) -> StatusView:
        """Wait for it, bounded."""
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
        """Wait until that many incarnations have begun and the newest has trained for a while."""

        first: list[int] = []

        def does(view: StatusView) -> bool:
            if view.state != "running" or view.incarnation < incarnation or not view.workers:
                return False
            first.append(min(worker.step for worker in view.workers))
            return first[-1] >= first[0] + self._steps_between

        return self.until(does, f"incarnation {incarnation} trains")

    def wait(self) -> int:
        """The run's exit code."""
        if self._process is None:
            raise AssertionError("it does not run")
        return self._process.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        """End everything of it."""
        if self._process is not None and self._process.poll() is None:
            found = [psutil.Process(self._process.pid)]
            found += found[0].children(recursive=True)
            for one in found:
                with contextlib.suppress(psutil.Error):
                    one.kill()
            self._process.wait(10)

    # -- what happens to it -------------------------------------------------------------------

    def pass_by(self) -> None:
        """All of it, until the job trains for the last time."""
        self.start()
        for number, (what, happens) in enumerate(self._disturbances(), start=1):
            view = self.trains(number)
            happens(view)
            self.told.append(what)
        self.trains(len(self.told) + 1)

    def _disturbances(self) -> list[tuple[str, Callable[[StatusView], None]]]:
        return [
            ("SIGKILL to rank 1", self._kill_rank),
            ("SIGTERM to the supervisor, run again", self._notice),
            ("a loss that is no number", lambda _: self._make("nan")),
            ("SIGKILL to the supervisor, run again", self._kill_supervisor),
            ("a rank that raises", lambda _: self._make("raise")),
            ("SIGTERM, run again on three ranks", lambda view: self._notice(view, nproc=3)),
            ("a rank that hangs", lambda _: self._make("hang")),
            ("SIGTERM, run again on two ranks", self._notice),
            ("SIGTERM, a flipped bit, run again", self._flip_bit),
            ("SIGKILL to the agent", self._kill_agent),
            ("SIGUSR1 to the supervisor, run again", self._signal),
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
        """Give it a notice, and wait until it has saved and gone."""
        if self._process is None:
            raise AssertionError("it does not run")
        self._process.send_signal(number)
        code = self.wait()
        if code != 75:
            raise AssertionError(f"left with {code}:\n{self.log.read_text()[-3000:]}")

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
