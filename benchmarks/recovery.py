"""From a worker's death to the end of the next step.

The same script runs under ``elastic-ckpt run`` with a Session and under torchrun with its own save
and load; both import ColossalAI where it is installed. In turns, each is started, trains past a
save, loses rank 1 to a SIGKILL, and is watched until every rank of the next launch has finished a
step. The clock is the killer's, so the detection counts.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from harness import (
    Options,
    Places,
    Report,
    Row,
    goal,
    places,
    progress,
    ratios,
    read_options,
    summary,
)
from jobs import Job, OurJob, Step, TooSlow, TorchrunJob

OURS = "elastic-ckpt run"
FLOOR = "torchrun --max-restarts"
SAVE_EVERY = 10
VICTIM = 1
LIMIT_SECONDS = 90.0
QUICK_LIMIT_SECONDS = 20.0


def recover(job: Job, limit: float) -> tuple[float, list[dict[str, Any]]]:
    """Kill a worker of a running job; seconds to the next step, and the journal's breakdown.

    Raises:
        TooSlow: it had not recovered after ``limit`` seconds.
    """
    with job:
        before = job.until_step(SAVE_EVERY + 2)
        killed = time.monotonic()
        os.kill(before[VICTIM].pid, signal.SIGKILL)
        old = {step.pid for step in before}

        def next_steps() -> list[Step] | None:
            firsts = [next((one for one in own if one.pid not in old), None) for own in job.steps()]
            whole = [one for one in firsts if one is not None]
            return whole if len(whole) == len(firsts) else None

        steps = job.until(next_steps, "recovery", seconds=limit)
        seconds = max(step.time for step in steps) - killed
        stages: list[dict[str, Any]] = []
        if isinstance(job, OurJob):
            with contextlib.suppress(Exception):  # written a moment after the step, if at all
                stages = job.until(lambda: job.events("recovery") or None, "", seconds=2.0)
        return seconds, stages


@dataclass
class Found:
    """Seconds of each pass in which both recovered.

    Attributes:
        stuck: passes in which torchrun did not; they are left out.
        stages: seconds of each stage of ours, from the journal.
    """

    floor: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    stuck: int = 0
    stages: list[dict[str, float]] = field(default_factory=list)


def limit_seconds(options: Options) -> float:
    """How long torchrun may take."""
    return QUICK_LIMIT_SECONDS if options.quick else LIMIT_SECONDS


def measure(options: Options, where: Places) -> Found:
    """Passes until enough of them count, at most twice as many; the first one warms up."""
    arguments = ["--size", str(options.megabytes), "--every", str(SAVE_EVERY)]
    found = Found()
    for turn in range(2 * options.repeats + 1):
        place = where.disk / f"torchrun-{turn}"
        floor: float | None = None
        with contextlib.suppress(TooSlow):
            floor, _ = recover(
                TorchrunJob(place, *arguments, light=options.quick), limit_seconds(options)
            )
        place = where.disk / f"ours-{turn}"
        ours, stages = recover(
            OurJob(place, where.memory, *arguments, light=options.quick), LIMIT_SECONDS
        )
        progress(f"pass {turn}: torchrun {floor or math.inf:.2f} s, ours {ours:.2f} s")
        if floor is None:
            found.stuck += 1
        elif turn or options.quick:
            found.floor.append(floor)
            found.ours.append(ours)
            found.stages += [one["data"]["stages"] for one in stages]
        if len(found.floor) == options.repeats or (options.quick and found.stuck):
            break
    return found


def _medians(passes: list[dict[str, float]]) -> str:
    """Return each stage's median over the passes."""
    medians = {
        stage: statistics.median(one.get(stage, 0.0) for one in passes) for stage in passes[0]
    }
    return ", ".join(f"{stage} {value:.3f}" for stage, value in medians.items())


def main() -> None:
    """Print the table."""
    options = read_options(__doc__, megabytes=100.0)
    with places(options.directory) as where:
        found = measure(options, where)
    title = "Recovery: SIGKILL of a worker to the end of the next step, 2 ranks"
    report = Report("recovery", title, {"megabytes": options.megabytes, "ranks": 2})
    stuck = (
        f"in {found.stuck} passes torchrun had not recovered after {limit_seconds(options):.0f} s"
    )
    if found.floor:
        report.rows = [
            summary(FLOOR, found.floor, found.floor),
            summary(OURS, found.ours, found.floor),
        ]
        what = "recovery from a SIGKILL / torchrun's on the same script"
        report.goals.append(goal(what, ratios(found.ours, found.floor), 0.15))
    else:
        report.rows = [Row(name, note=f"not measured: {stuck}") for name in (FLOOR, OURS)]
    if found.stuck:
        report.notes.append(f"{stuck}; they are left out")
    if found.stages:
        report.notes.append(f"elastic-ckpt by stage, medians in s: {_medians(found.stages)}")
    report.show(options)


if __name__ == "__main__":
    main()
