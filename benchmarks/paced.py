"""A training run with failures at the pace of a real one, beside the same run undisturbed.

3,000 steps of 0.1 s; every 45 to 75 s, drawn from a seed, a worker is killed. That is a run with
steps of 6 s and a failure every 45 to 75 minutes, at a sixtieth of the time, except that a recovery
takes what it takes. The floor is torchrun on the same script without failures and without a save;
under ``elastic-ckpt run`` the script saves every ten steps. The clock runs from the start of the
command to the end of the last step on all ranks.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from harness import Options, Places, Report, goal, places, progress, ratios, read_options, summary
from jobs import Job, OurJob, TorchrunJob

STEPS, QUICK_STEPS = 3000, 300
STEP_SECONDS = 0.1
BETWEEN_SECONDS = (45.0, 75.0)
QUICK_BETWEEN_SECONDS = (5.0, 8.0)
SEED = 2026
FLOOR = "torchrun, undisturbed, no save"
CALM = "elastic-ckpt run, undisturbed"
OURS = "elastic-ckpt run, with failures"


def seconds_to_finish(job: Job, steps: int, gaps: Iterator[float] | None) -> tuple[float, int]:
    """How long the job takes, and how often a worker was killed.

    Args:
        gaps: seconds between two failures; None for none.
    """
    began = time.monotonic()
    failures = 0
    with job:
        job.until_step(1)
        due = time.monotonic() + next(gaps) if gaps else float("inf")
        while min((own[-1].number if own else 0) for own in job.steps()) < steps:
            if time.monotonic() >= due and gaps:
                victim = random.Random(failures).choice(job.steps())[-1]
                os.kill(victim.pid, signal.SIGKILL)
                failures += 1
                job.until(
                    lambda old=victim.pid: (
                        True if all(own[-1].pid != old for own in job.steps()) else None
                    ),
                    "the next launch",
                )
                due = time.monotonic() + next(gaps)
            if not job.alive():
                break
            time.sleep(0.05)
        last = [next(one.time for one in own if one.number == steps) for own in job.steps()]
    return max(last) - began, failures


def measure(options: Options, where: Places) -> Report:
    """Take turns, and compare."""
    steps = QUICK_STEPS if options.quick else STEPS
    bounds = QUICK_BETWEEN_SECONDS if options.quick else BETWEEN_SECONDS
    rng = random.Random(SEED)
    given = [
        "--size", str(options.megabytes), "--steps", str(steps), "--pause", str(STEP_SECONDS),
    ]  # fmt: skip
    often, never = [*given, "--every", "10"], [*given, "--every", str(2 * steps)]
    found: dict[str, list[float]] = {FLOOR: [], CALM: [], OURS: []}
    failures = 0

    def place(name: str, turn: int) -> Path:
        return where.disk / f"{name}-{turn}"

    for turn in range(options.repeats):
        floor, _ = seconds_to_finish(
            TorchrunJob(place("floor", turn), *never, light=True), steps, None
        )
        calm, _ = seconds_to_finish(
            OurJob(place("calm", turn), where.memory, *often, light=True), steps, None
        )
        ours, killed = seconds_to_finish(
            OurJob(place("ours", turn), where.memory, *often, light=True),
            steps,
            iter(lambda: rng.uniform(*bounds), 0.0),
        )
        progress(f"pass {turn + 1}: {floor:.1f} s, {calm:.1f} s, {ours:.1f} s ({killed} failures)")
        failures += killed
        for name, seconds in ((FLOOR, floor), (CALM, calm), (OURS, ours)):
            found[name].append(seconds)
    title = f"{steps} steps of {STEP_SECONDS} s, 2 ranks, {options.megabytes:.0f} MB of state"
    report = Report("paced", title, {"megabytes": options.megabytes, "seed": SEED})
    report.rows = [summary(name, seconds, found[FLOOR]) for name, seconds in found.items()]
    report.goals = [
        goal(
            f"with {failures} failures / undisturbed, {options.repeats} runs",
            ratios(found[OURS], found[FLOOR]),
            1.02,
        )
    ]
    return report


def main() -> None:
    """Measure, print, and write the JSON."""
    options = read_options(__doc__, megabytes=50.0, repeats=1)
    with places(options.directory) as where:
        measure(options, where).show(options)


if __name__ == "__main__":
    main()
