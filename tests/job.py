"""A real job for tests: started as a user would, observed through its files and its board."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from elastic_ckpt.cli.status.view import gather
from elastic_ckpt.jobdir.paths import JobDirectory

SCRIPTS = Path(__file__).parent / "scripts"
TINY = SCRIPTS / "tiny.py"
START_SECONDS = 240.0 * float(os.environ.get("ELASTIC_CKPT_TEST_PATIENCE", "1"))
JOB_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
MEMORY = Path("/dev/shm")


def is_one_error(lines: list[str]) -> bool:
    """Return whether a run printed one line of error, and then nothing but what to do next."""
    error, *advice = lines
    begin = [line.partition(": ")[2].partition(": ")[0] for line in (error, *advice[:1])]
    return begin == ["error", "next"] and all(line.startswith("  ") for line in advice[1:])


class Job:
    """One job directory and, while it runs, its supervisor."""

    def __init__(self, directory: Path, *arguments: str, nproc: int = 2, script: Path = TINY):
        self.root = directory
        self.directory = directory / "job"
        self.nproc = nproc
        self.script = script
        self.arguments = list(arguments)
        self.options: list[str] = []
        self.prefix: list[str] = []  # put before the command, to run it elsewhere
        self.packages: list[Path] = []
        self.log = directory / "log"
        self.output_to: int | None = None  # a descriptor in place of the log
        self.memory = MEMORY
        self.process: subprocess.Popen | None = None
        self.started: list[int] = []  # pids of all supervisors
        directory.mkdir(parents=True, exist_ok=True)

    # -- starting and ending --------------------------------------------------------------

    def start(self, *options: str) -> "Job":
        command = [
            *self.prefix, sys.executable, "-m", "elastic_ckpt", "run", "--dir", str(self.directory),
            "--nproc", str(self.nproc), *self.options, *options,
            "--", str(self.script), *self.arguments,
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log if self.output_to is None else self.output_to,
                stderr=log if self.output_to is None else self.output_to,
                env=environment(*self.packages),
            )
        self.started.append(self.process.pid)
        return self

    def wait(self, seconds: float = START_SECONDS) -> int:
        """Return the supervisor's exit code."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output()}") from None

    def finish(self, seconds: float = 120.0) -> int:
        """Rerun, as a requeue hook does, until the exit code no longer asks for it."""
        limit = time.monotonic() + seconds
        while True:
            code = self.start().wait(max(1.0, limit - time.monotonic()))
            if code not in (75, 76):
                return code

    def close(self) -> None:
        """Kill every process of this job, by process id."""
        if self.process is not None:
            with contextlib.suppress(psutil.Error):
                kill_tree(psutil.Process(self.process.pid))
            self.process.wait(30)
        for tier in self.tiers():
            shutil.rmtree(tier)
        remove_orphaned_batches()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- looking -----------------------------------------------------------------------------

    def output(self) -> str:
        return self.log.read_text()[-6000:] if self.log.exists() else ""

    def view(self):
        return gather(JobDirectory.at(self.directory))

    def until(self, condition, what: str, seconds: float = START_SECONDS):
        """Wait, bounded, until ``condition(view)`` is true; returns the view."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            with contextlib.suppress(Exception):
                view = self.view()
                if condition(view):
                    return view
            if self.process is not None and self.process.poll() is not None:
                view = self.view()
                if condition(view):
                    return view
                raise AssertionError(
                    f"the run ended with {self.process.returncode} before {what}:\n{self.output()}"
                )
            time.sleep(0.02)
        raise AssertionError(f"not within {seconds} s: {what}\n{self.output()}")

    def until_step(self, step: int):
        """Wait until every rank has finished ``step``."""
        return self.until(
            lambda view: (
                len(view.workers) == self.nproc
                and all(w.phase == "training" and w.step >= step for w in view.workers)
            ),
            f"step {step}",
        )

    def until_training(self):
        """Wait until the current incarnation trains."""
        return self.until(
            lambda view: (
                view.state == "running"
                and len(view.workers) == self.nproc
                and all(w.phase == "training" for w in view.workers)
            ),
            "training",
        )

    # -- who is who -----------------------------------------------------------------------------

    def supervisor(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def agent(self) -> psutil.Process:
        return next(p for p in self.supervisor().children() if "agent" in " ".join(p.cmdline()))

    def forkserver(self) -> psutil.Process:
        return next(p for p in self.agent().children() if "forkserver" in " ".join(p.cmdline()))

    def workers(self) -> list[psutil.Process]:
        return [psutil.Process(worker.pid) for worker in self.view().workers]

    def tree(self) -> list[psutil.Process]:
        return [self.supervisor(), *self.supervisor().children(recursive=True)]

    # -- results --------------------------------------------------------------------------------

    def events(self) -> list[dict]:
        lines = []
        for path in (self.directory / ".elastic-ckpt" / "journal").glob("*.jsonl"):
            lines += [json.loads(line) for line in path.read_text().splitlines() if line]
        return lines

    def tiers(self) -> list[Path]:
        """Return the job's directories in shared memory."""
        roots = {str(self.directory), str(self.directory.resolve())}
        return [
            owner.parent
            for owner in self.memory.glob("elastic-ckpt-*/owner.json")
            if json.loads(owner.read_text() or "{}").get("root") in roots
        ]

    def checkpoints(self) -> list[Path]:
        return sorted(self.directory.glob("epoch-*"))


def catch_ignored_signals() -> None:
    """Let this process's children start with default signal handling.

    A child inherits which signals are ignored, and a supervisor honours that: under ``nohup`` it
    would not react to SIGHUP, nor to SIGINT from a script that was started in the background. A
    handler that does nothing keeps this process as deaf as before and is not inherited by exec.
    """
    for number in JOB_SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def environment(*packages: Path) -> dict[str, str]:
    """Return this process's environment, without variables that change a job.

    Args:
        packages: directories of further packages.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ELASTIC_", "SLURM"))}
    path = [Path(__file__).parent.parent, *packages]
    return clean | {"PYTHONPATH": os.pathsep.join(map(str, path))}


def remove_orphaned_batches() -> None:
    """Remove the batches that killed DataLoader children had handed over.

    Torch names such a file after its maker and unlinks it a moment later.
    """
    for path in MEMORY.glob("torch_*_*"):
        maker = path.name.split("_")[1]
        if maker.isdecimal() and not psutil.pid_exists(int(maker)):
            path.unlink(missing_ok=True)


def kill_tree(process: psutil.Process) -> None:
    """Kill all but multiprocessing's trackers, which then remove the others' semaphores and end."""
    tree = [*process.children(recursive=True), process]
    trackers = [found for found in tree if is_tracker(found)]
    for victim in tree:
        if victim not in trackers:
            with contextlib.suppress(psutil.Error):
                victim.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(tree, timeout=30)
    for victim in left:
        with contextlib.suppress(psutil.Error):
            victim.send_signal(signal.SIGKILL)
    psutil.wait_procs(left, timeout=30)


def is_tracker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "resource_tracker" in " ".join(process.cmdline())
    return False


def survivors(processes: list[psutil.Process], seconds: float = 10.0) -> list[psutil.Process]:
    """Return those that still run after ``seconds``."""
    _, left = psutil.wait_procs(processes, timeout=seconds)
    return [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def used_samples(trace: Path, ranks: int) -> dict[tuple[int, int], list]:
    """Map (step, rank) to the samples and loss of the last incarnation that did the step."""
    used: dict[tuple[int, int], list] = {}
    for rank in range(ranks):
        for line in Path(f"{trace}.{rank}").read_text().splitlines():
            with contextlib.suppress(ValueError):  # a rank was killed while writing
                step, *rest = json.loads(line)
                used[step, rank] = rest
    return used


catch_ignored_signals()
