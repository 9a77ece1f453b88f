"""What the supervisor, the agent and the template take while a job trains.

A small job of two ranks trains under ``elastic-ckpt run``; processor time is counted over windows
of some seconds, resident memory at the end of each. Goal for the supervisor: at most 1 % of a core
and 80 MB.
"""

from __future__ import annotations

import time

import psutil
from harness import Options, Places, Report, goal, places, read_options, summary
from jobs import Job, OurJob

WINDOW_SECONDS = 10.0
QUICK_SECONDS = 0.5
KINDS = {"agent": "agent", "template": "forkserver"}


def processes(job: Job) -> dict[str, psutil.Process]:
    """The long-lived ones of a run, by what they are."""
    found = {"supervisor": psutil.Process(job.process.pid)}
    for child in found["supervisor"].children(recursive=True):
        line = " ".join(child.cmdline())
        for name, mark in KINDS.items():
            if mark in line and name not in found:
                found[name] = child
    return found


def measure(options: Options, where: Places) -> dict[str, tuple[list[float], list[float]]]:
    """Percent of a core and megabytes, by process, one of each per window."""
    seconds = QUICK_SECONDS if options.quick else WINDOW_SECONDS
    arguments = ["--size", str(options.megabytes), "--every", "0"]
    with OurJob(where.disk / "idle", where.memory, *arguments, light=options.quick) as job:
        job.until_step(5)
        watched = processes(job)
        found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in watched}
        for _ in range(options.repeats):
            began = {name: (_cpu(one), time.monotonic()) for name, one in watched.items()}
            time.sleep(seconds)
            for name, one in watched.items():
                used, since = began[name]
                share = (_cpu(one) - used) / (time.monotonic() - since)
                found[name][0].append(100 * share)
                found[name][1].append(one.memory_info().rss / 1e6)
        return found


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """Print the table."""
    options = read_options(__doc__, megabytes=24.0)
    with places(options.directory) as where:
        found = measure(options, where)
    report = Report("idle", "While a job of 2 ranks trains", {"megabytes": options.megabytes})
    for name, (percent, megabytes) in found.items():
        report.rows.append(summary(f"{name}, of a core", percent, unit="%"))
        report.rows.append(summary(f"{name}, resident", megabytes, unit="MB"))
    percent, megabytes = found["supervisor"]
    report.goals.append(goal("supervisor, share of a core", percent, 1.0, " %"))
    report.goals.append(goal("supervisor, resident memory", megabytes, 80.0, " MB"))
    report.show(options)


if __name__ == "__main__":
    main()
