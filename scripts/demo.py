"""Show a whole job: preempted, killed, resumed, and identical to an undisturbed one.

Trains the byte-level GPT of ``examples/byte_gpt.py`` twice, once undisturbed and once with a
SIGTERM to the supervisor and a SIGKILL to a worker, and compares the two bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from elastic_ckpt.cli.status.view import StatusView, gather
from elastic_ckpt.jobdir.paths import JobDirectory

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 2
STEPS = EPOCHS * 100
RANKS = 2
LIMIT_SECONDS = 150.0

console = Console(highlight=False)


class Run:
    """One job of the demo: its directory and its supervisor."""

    def __init__(self, directory: Path, progress: Progress, label: str) -> None:
        self.directory = directory / "checkpoints"
        self.record = directory / "record"
        self.log = directory / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self._progress = progress
        self._task = progress.add_task(label, total=STEPS)
        directory.mkdir(parents=True)

    def start(self) -> None:
        """Start ``elastic-ckpt run``, with its output in a file."""
        command = [
            sys.executable, "-m", "elastic_ckpt", "run", "--dir", str(self.directory),
            "--nproc", str(RANKS), "--", str(ROOT / "examples" / "byte_gpt.py"),
            "--epochs", str(EPOCHS), "--record", str(self.record),
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def follow(self, until_step: int) -> StatusView:
        """Update the bar until a step is finished or the supervisor exits."""
        limit = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < limit:
            ended = self.process is None or self.process.poll() is not None
            view = gather(JobDirectory.at(self.directory)) if self.directory.exists() else None
            if view is not None:
                step = view.position.step if view.position else 0
                self._progress.update(self._task, completed=step)
                at_work = bool(view.workers) and view.state == "running"
                if ended or (at_work and step >= until_step):
                    return view
            elif ended:
                break
            time.sleep(0.05)
        tail = self.log.read_text()[-2000:]
        raise SystemExit(f"the demo's job did not reach step {until_step}:\n{tail}")

    def wait(self) -> int:
        """Wait for the supervisor, and return its exit code."""
        self.follow(STEPS + 1)
        if self.process is None:
            raise SystemExit("not started")
        return self.process.wait(LIMIT_SECONDS)

    def close(self) -> None:
        """Stop the supervisor if it still runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(40)


def main() -> int:
    """Run both jobs, show their status, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=ROOT / "demo-run")
    directory = parser.parse_args().dir
    shutil.rmtree(directory, ignore_errors=True)
    began = time.monotonic()
    columns = (
        TextColumn("  {task.description:<12}"), BarColumn(40),
        TextColumn("step {task.completed:>3.0f}/{task.total:.0f}"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        calm = Run(directory / "undisturbed", progress, "undisturbed")
        try:
            calm.start()
            expect(calm.wait(), 0, calm)
        finally:
            calm.close()
        wild = Run(directory / "disturbed", progress, "disturbed")
        try:
            disturb(wild)
        finally:
            wild.close()
    show("status", wild.directory)
    show("list", wild.directory)
    same = compare(calm.record, wild.record)
    console.print(f"\n  took {time.monotonic() - began:.0f} s; files are in {directory}")
    return 0 if same else 1


def disturb(wild: Run) -> None:
    """Preempt the job, rerun it, and kill a worker."""
    wild.start()
    say(f"training on {RANKS} workers")
    wild.follow(60)
    say("[yellow]SIGTERM[/] to the supervisor, as on a spot node before it is taken away")
    at = time.monotonic()
    send(wild, signal.SIGTERM)
    expect(wild.wait(), 75, wild)
    view = gather(JobDirectory.at(wild.directory))
    sealed = view.newest_intact.step if view.newest_intact else None
    say(f"saved and sealed step {sealed}, exited with 75 after {time.monotonic() - at:.1f} s")
    say("rerun, as a requeue hook or systemd does on 75")
    wild.start()
    view = wild.follow((sealed or 0) + 30)
    victim = view.workers[-1]
    say(f"[red]SIGKILL[/] to rank {victim.rank}")
    at = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    incarnation = view.incarnation
    while view.incarnation == incarnation or view.state != "running":
        view = gather(JobDirectory.at(wild.directory))
        if time.monotonic() > at + LIMIT_SECONDS:
            raise SystemExit("the job did not recover")
        time.sleep(0.02)
    say(f"training again {time.monotonic() - at:.1f} s later")
    expect(wild.wait(), 0, wild)
    say("finished")


def send(run: Run, number: int) -> None:
    """Signal the supervisor."""
    if run.process is not None:
        run.process.send_signal(number)


def expect(code: int, wanted: int, run: Run) -> None:
    """Exit if a run has another exit code than expected."""
    if code != wanted:
        raise SystemExit(f"exit code {code} instead of {wanted}:\n{run.log.read_text()[-2000:]}")


def say(line: str) -> None:
    """Print one event."""
    console.print(f"  [dim]•[/] {line}")


def show(command: str, directory: Path) -> None:
    """Print a command and its output."""
    console.print(
        f"\n[bold]$ elastic-ckpt {command} {directory.relative_to(Path.cwd())}[/]"
        if directory.is_relative_to(Path.cwd())
        else f"\n$ elastic-ckpt {command}"
    )
    sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "elastic_ckpt", command, str(directory)], check=False)


def compare(calm: Path, wild: Path) -> bool:
    """Whether both runs used the same samples in each step and ended with the same bits."""
    samples = [used_samples(record) for record in (calm, wild)]
    parameters = [(record / "parameters").read_text() for record in (calm, wild)]
    same_samples = samples[0] == samples[1] and len(samples[0]) == STEPS * RANKS
    same_parameters = parameters[0] == parameters[1]
    console.print()
    for what, same in (
        (f"samples and losses of all {STEPS} steps on {RANKS} ranks", same_samples),
        (f"final parameters (sha256 {parameters[1][:12]}…)", same_parameters),
    ):
        result = "[green]identical[/]" if same else "[red]DIFFERENT[/]"
        console.print(f"  {result}  {what}")
    return same_samples and same_parameters


def used_samples(record: Path) -> dict[tuple[int, int], list[object]]:
    """Return epoch, samples and loss by (step, rank); a repeated step counts once."""
    used: dict[tuple[int, int], list[object]] = {}
    for rank in range(RANKS):
        for line in (record / f"samples.{rank}").read_text().splitlines():
            with contextlib.suppress(ValueError):  # the killed rank's last line may be torn
                step, *rest = json.loads(line)
                used[step, rank] = rest
    return used


if __name__ == "__main__":
    sys.exit(main())
