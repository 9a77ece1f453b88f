"""Whole training jobs for a benchmark, started as a user would; ended by process id."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

SCRIPT = Path(__file__).parent / "scripts" / "training_job.py"
WORLD_SIZE = 2
START_SECONDS = 120.0
_POLL_SECONDS = 0.002

T = TypeVar("T")


class JobFailed(Exception):
    """It did not do what was waited for; the text ends with its output."""


class TooSlow(JobFailed):
    """It still runs, and has not done it."""


@dataclass(frozen=True)
class Step:
    """The end of a step on one rank; ``time`` is on the monotonic clock."""

    number: int
    time: float
    pid: int


class Job:
    """One job in a directory of its own; subclasses say how it is launched.

    Args:
        light: without ColossalAI, whose import takes seconds.
    """

    def __init__(self, directory: Path, *arguments: str, light: bool = False) -> None:
        directory.mkdir()
        self.directory = directory
        self.saved = directory / "job"
        self._trace = directory / "trace"
        self._light = light
        self._arguments = ["--trace", str(self._trace), *arguments, *(["--light"] if light else [])]
        self._log = directory / "log"
        self._process: psutil.Popen | None = None

    def command(self, arguments: Sequence[str]) -> list[str]:
        """What is executed."""
        raise NotImplementedError

    def __enter__(self) -> Job:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ELASTIC_", "SLURM"))}
        root = str(Path(__file__).resolve().parents[1])
        with open(self._log, "ab") as log:
            self._process = psutil.Popen(
                self.command(self._arguments),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=kept | {"PYTHONPATH": root},
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        tree = [*self.process.children(recursive=True), self.process] if self.alive() else []
        for victim in tree:
            with contextlib.suppress(psutil.Error):
                # The tracker of semaphores removes them when its last client has gone.
                if "resource_tracker" not in " ".join(victim.cmdline()):
                    victim.kill()
        _, left = psutil.wait_procs(tree, timeout=10)
        for victim in left:
            with contextlib.suppress(psutil.Error):
                victim.kill()
        psutil.wait_procs(left, timeout=10)

    @property
    def process(self) -> psutil.Popen:
        """The supervisor, or torchrun."""
        assert self._process is not None
        return self._process

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def steps(self) -> list[list[Step]]:
        """What each rank has finished."""
        found: list[list[Step]] = []
        for rank in range(WORLD_SIZE):
            found.append([])
            with contextlib.suppress(FileNotFoundError):
                for line in Path(f"{self._trace}.{rank}").read_text().splitlines():
                    words = line.split()
                    if len(words) == 3:  # a killed rank may have written half a line
                        found[-1].append(Step(int(words[0]), float(words[1]), int(words[2])))
        return found

    def until_step(self, number: int, *, seconds: float = START_SECONDS) -> list[Step]:
        """Wait until every rank has finished it; the last step of each."""
        return self.until(
            lambda: (
                [own[-1] for own in self.steps()]
                if all(own and own[-1].number >= number for own in self.steps())
                else None
            ),
            f"step {number}",
            seconds=seconds,
        )

    def until(
        self, look: Callable[[], T | None], what: str, *, seconds: float = START_SECONDS
    ) -> T:
        """Wait until ``look`` finds something.

        Raises:
            JobFailed: it did not in time, or the job has ended.
        """
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            ended = not self.alive()
            found = look()
            if found is not None:
                return found
            if ended:
                raise JobFailed(f"it ended before {what}:\n{self.output()}")
            time.sleep(_POLL_SECONDS)
        raise TooSlow(f"not within {seconds:.0f} s: {what}\n{self.output()}")

    def output(self) -> str:
        """The end of what it printed."""
        return self._log.read_text(errors="replace")[-3000:]


class OurJob(Job):
    """Under ``elastic-ckpt run``.

    Args:
        memory: where its memory tier is made: a job that is killed leaves it there.
    """

    def __init__(self, directory: Path, memory: Path, *arguments: str, light: bool = False) -> None:
        super().__init__(directory, *arguments, light=light)
        self._memory = memory

    def command(self, arguments: Sequence[str]) -> list[str]:
        preload = ["--preload", "torch"] if self._light else []
        return [
            sys.executable, "-m", "elastic_ckpt", "run", "--dir", str(self.saved),
            "--nproc", str(WORLD_SIZE), "--memory-dir", str(self._memory), *preload,
            "--", str(SCRIPT), *arguments,
        ]  # fmt: skip

    def events(self, name: str) -> list[dict[str, Any]]:
        """Events of that name in its journal, each with its own fields under ``data``."""
        found = []
        for path in (self.saved / ".elastic-ckpt" / "journal").glob("*.jsonl"):
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if event["event"] == name:
                        found.append(event)
        return found


class TorchrunJob(Job):
    """Under torchrun, which restarts the workers; the script saves by itself."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        return [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(WORLD_SIZE), "--max-restarts", "10", str(SCRIPT),
            "--plain", str(self.directory / "last.pt"), *arguments,
        ]  # fmt: skip
