"""How many system calls on the job directory a save, an idle job, ``list`` and retention make.

A shared file system answers each of them over the network, so they are what makes it slow. They are
counted with strace: every call whose line names a path in the job directory, also through a
descriptor.

- *save*: by two ranks that save to the disk, from one seal to the next, on the attempt, the
  checkpoint and the directories that they are in. Goal: at most 120. Those on control files (run
  number, journal, logs) are counted apart.
- *idle supervisor*: in each second while the script of two ranks sleeps. Goal: at most 2.
- *list*: of 100 checkpoints. Goal: at most 500.
- *retention*: a pass that deletes one checkpoint, with 100 and with 1,000 kept; the first pass of a
  process, which reads all of them, is not counted. Goal: the same for both, within 10 %.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import (
    Goal,
    Options,
    Places,
    Report,
    Row,
    goal,
    places,
    progress,
    read_options,
    summary,
)
from jobs import OurJob
from scripts.retention_pass import fill, fresh_job

ROOT = Path(__file__).resolve().parents[1]
PASS = Path(__file__).parent / "scripts" / "retention_pass.py"
STRACE = (
    "strace", "-f", "--seccomp-bpf", "-qq", "-y", "-ttt", "-s", "0", "-e", "trace=file,desc,fsync",
)  # fmt: skip
_LINE = re.compile(r"(\d+) +(\d+\.\d+) (\w+)\((.*)")
_SEALED = re.compile(r'"[^"]*/\.attempts/[^"]*", "[^"]*/epoch-\d+_step-\d+"')
SAVE_STEPS = 5
WINDOW_SECONDS = 10.0
QUICK_SECONDS = 1.0
PATIENCE_SECONDS = 400.0
"""For a start, on a machine that has other work."""


@dataclass(frozen=True)
class Call:
    """One system call of a thread on the job directory; ``time`` is the wall clock's."""

    thread: int
    time: float
    name: str
    arguments: str

    @property
    def seals(self) -> bool:
        """Whether it renames an attempt to a checkpoint."""
        return self.name.startswith("rename") and _SEALED.search(self.arguments) is not None

    @property
    def controls(self) -> bool:
        """Whether it is on the job's control files: run numbers, journal, logs, records."""
        return "/.elastic-ckpt" in self.arguments


def read_trace(trace: Path, directory: Path) -> list[Call]:
    """The calls that name a path in a directory, in order."""
    found = []
    with open(trace, errors="replace") as lines:
        for line in lines:
            match = _LINE.match(line) if str(directory) in line else None
            if match is not None:
                found.append(Call(int(match[1]), float(match[2]), match[3], match[4]))
    return found


class DiskJob(OurJob):
    """A small job without a memory tier."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        plain = super().command(arguments)
        plain[plain.index("--memory-dir") + 1] = "off"
        return plain


@dataclass
class Watched:
    """What a job that has started called; ``supervisor`` has the kernel's numbers of its threads.
    ``calls`` is complete once the block of :func:`watching` has ended."""

    supervisor: set[int]
    calls: list[Call]


@contextlib.contextmanager
def watching(job: OurJob) -> Iterator[Watched]:
    """Attach strace to all of a job's processes."""
    tree = [job.process, *job.process.children(recursive=True)]
    trace = job.directory / "calls"
    attach = [word for one in tree for word in ("-p", str(one.pid))]
    strace = subprocess.Popen([*STRACE, "-o", str(trace), *attach], stderr=subprocess.DEVNULL)
    found = Watched(set(), [])
    try:
        job.until(
            lambda: (trace.exists() and trace.stat().st_size > 0) or None, "strace's first line"
        )
        yield found
        found.supervisor = {thread.id for thread in job.process.threads()}
    finally:
        strace.terminate()
        strace.wait(30)
    found.calls = read_trace(trace, job.saved)


@dataclass(frozen=True)
class SaveCalls:
    """Calls from one seal to the next: of the ranks on the checkpoint and on control files, and of
    the supervisor."""

    checkpoint: float
    control: float
    supervisor: float


def measure_saves(where: Places, saves: int) -> list[SaveCalls]:
    """Count the calls of each of some saves."""
    pace = ["--size", "1", "--every", str(SAVE_STEPS), "--pause", "0.2"]
    with DiskJob(where.disk / "save", where.memory, *pace, light=True) as job:
        begin = job.until_step(1, seconds=PATIENCE_SECONDS)[0].number
        with watching(job) as found:
            job.until_step(begin + SAVE_STEPS * (saves + 2), seconds=PATIENCE_SECONDS)
    seals = [index for index, call in enumerate(found.calls) if call.seals][: saves + 1]
    each = []
    for first, last in itertools.pairwise(seals):
        calls = found.calls[first:last]
        ranks = [call for call in calls if call.thread not in found.supervisor]
        control = sum(call.controls for call in ranks)
        each.append(SaveCalls(len(ranks) - control, control, len(calls) - len(ranks)))
    return each


def measure_idle(where: Places, options: Options) -> list[float]:
    """The supervisor's calls per second, of each window."""
    seconds = QUICK_SECONDS if options.quick else WINDOW_SECONDS
    pace = ["--size", "1", "--every", "0", "--sleep-from", "3"]
    with DiskJob(where.disk / "idle", where.memory, *pace, light=True) as job:
        job.until_step(3, seconds=PATIENCE_SECONDS)
        time.sleep(seconds)  # what the first steps lead to
        with watching(job) as found:
            limits = [time.time()]
            for _ in range(options.repeats):
                time.sleep(seconds)
                limits.append(time.time())
    calls = [call.time for call in found.calls if call.thread in found.supervisor]
    windows = itertools.pairwise(limits)
    return [sum(low <= at < high for at in calls) / (high - low) for low, high in windows]


def traced(arguments: Iterable[str], directory: Path, trace: Path) -> tuple[list[Call], str]:
    """The calls of a command on a directory, and what it printed."""
    done = subprocess.run(
        [*STRACE, "-o", str(trace), sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return read_trace(trace, directory), done.stdout


def measure_list(where: Places, count: int) -> float:
    """The calls of one ``list``."""
    job = fresh_job(where.disk / "list")
    fill(job, 1, count)
    arguments = ["-m", "elastic_ckpt", "list", "--json", str(job.root)]
    calls, printed = traced(arguments, job.root, where.disk / "calls-of-list")
    if len(json.loads(printed)) != count:
        raise SystemExit(f"list did not show {count} checkpoints:\n{printed}")
    return float(len(calls))


def measure_retention(where: Places, count: int) -> tuple[float, float]:
    """Calls of one pass, and its processor time in seconds without strace."""
    job = fresh_job(where.disk / f"retention-{count}")
    fill(job, 1, count)
    arguments = [str(PASS), str(job.root), str(count)]
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    trace = where.disk / f"calls-of-retention-{count}"
    calls, printed = traced([str(PASS), str(job.root), str(count)], job.root, trace)
    low, high = json.loads(printed)["wall"]
    found = sum(low <= call.time < high for call in calls)
    shutil.rmtree(job.root)
    return float(found), float(json.loads(done.stdout)["cpu_seconds"])


def measure(options: Options, where: Places, report: Report) -> None:
    """Fill the report."""
    progress("saves of two ranks")
    saves = measure_saves(where, options.repeats)
    checkpoint = [one.checkpoint for one in saves]
    control, supervisor = [one.control for one in saves], [one.supervisor for one in saves]
    report.rows.append(summary("save of two ranks, checkpoint", checkpoint, unit="calls"))
    report.rows.append(summary("save of two ranks, control files", control, unit="calls"))
    report.rows.append(summary("supervisor, between two saves", supervisor, unit="calls"))
    progress("an idle supervisor")
    idle = measure_idle(where, options)
    report.rows.append(summary("idle supervisor", idle, unit="calls/s"))
    count = 5 if options.quick else 100
    progress(f"list of {count} checkpoints")
    listed = measure_list(where, count)
    report.rows.append(summary(f"list of {count} checkpoints", [listed], unit="calls"))
    report.goals.append(goal("calls of a save of two ranks", checkpoint, 120))
    report.goals.append(goal("calls of an idle supervisor per second", idle, 2))
    report.goals.append(goal(f"calls of list, {count} checkpoints", [listed], 5.0 * count))
    few, many = (10, 20) if options.quick else (100, 1000)
    passes = {}
    for kept in (few, many):
        progress(f"retention with {kept} kept")
        passes[kept] = calls, seconds = measure_retention(where, kept)
        name = f"retention pass, {kept:,} kept"
        more = {"processor ms": 1000 * seconds}
        report.rows.append(Row(name, "calls", calls, calls, calls, more=more))
    ratio = passes[many][0] / passes[few][0]
    what = f"calls of a retention pass with {many:,} kept / with {few:,}"
    report.goals.append(Goal(what, ratio, ratio, ratio, 1.1))


def main() -> None:
    """Print the table."""
    options = read_options(__doc__, megabytes=1.0, repeats=3)
    if shutil.which("strace") is None:
        print("metadata: skipped, there is no strace")
        return
    report = Report("metadata", "System calls on the job directory", {"ranks": 2})
    with places(options.directory) as where:
        measure(options, where, report)
    report.show(options)


if __name__ == "__main__":
    main()
