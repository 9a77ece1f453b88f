"""From SIGTERM to a checkpoint that is sealed on the disk.

A job of two ranks trains under ``elastic-ckpt run`` and gets a SIGTERM within a step. The floor is
the rest of that step, read from the job's own trace, and then a raw O_DIRECT write and fsync of the
bytes of the checkpoint that it left, measured in the same pass.
"""

from __future__ import annotations

import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from durable import write_raw_files
from harness import Options, Places, Report, goal, places, progress, ratios, read_options, summary
from jobs import OurJob

from elastic_ckpt.checkpoint.verify import read_manifest

PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class Notice:
    """One notice, in seconds.

    Attributes:
        sealed: until the checkpoint stood sealed on the disk.
        ended: until the run had ended.
        rest: until the step was finished that ran when the notice came.
        write: of the floor's write.
    """

    sealed: float
    ended: float
    rest: float
    write: float


def give_notice(options: Options, where: Places, turn: int) -> Notice:
    """Start a job, end it with a notice, and write what it left once more."""
    size, pause = str(options.megabytes), str(PAUSE_SECONDS)
    directory = where.disk / f"job-{turn}"
    arguments = ["--size", size, "--pause", pause, "--every", "0"]
    with OurJob(directory, where.memory, *arguments, light=options.quick) as job:
        job.until_step(6)
        asked = time.monotonic()
        job.process.send_signal(signal.SIGTERM)
        sealed_at, path = job.until(lambda: _sealed(job.saved), "a checkpoint")
        job.process.wait(60)
        ended_at = time.monotonic()
        rest = max(
            min((step.time for step in own if step.time >= asked), default=asked)
            for own in job.steps()
        )
    raw = where.disk / "raw"
    files = {entry.path: entry.bytes for entry in read_manifest(path).files}
    copy = where.memory / "copy"
    shutil.copytree(path, copy)  # the floor writes from where the memory tier would have it
    began = time.monotonic()
    write_raw_files(copy, files, raw)
    written = time.monotonic() - began
    for used in (raw, directory, copy):
        shutil.rmtree(used)
    return Notice(sealed_at - asked, ended_at - asked, rest - asked, written)


def _sealed(job: Path) -> tuple[float, Path] | None:
    """When a sealed checkpoint was seen on the disk, and where."""
    found = next(job.glob("epoch-*/manifest.json"), None)
    return (time.monotonic(), found.parent) if found else None


def main() -> None:
    """Print the table."""
    options = read_options(__doc__, megabytes=600.0)
    found = []
    with places(options.directory) as where:
        for turn in range(options.repeats + (0 if options.quick else 1)):
            notice = give_notice(options, where, turn)
            progress(f"pass {turn}: {notice}")
            if turn or options.quick:
                found.append(notice)
    floor = [one.rest + one.write for one in found]
    title = f"Emergency save, {options.megabytes:.0f} MB of state, 2 ranks"
    report = Report("emergency", title, {"megabytes": options.megabytes, "ranks": 2})
    report.rows = [
        summary("rest of the step", [one.rest for one in found]),
        summary("raw O_DIRECT write + fsync", [one.write for one in found]),
        summary("both, the floor", floor, floor),
        summary("SIGTERM to sealed on the disk", [one.sealed for one in found], floor),
        summary("SIGTERM to the end of the run", [one.ended for one in found], floor),
    ]
    what = "SIGTERM to sealed and durable / (rest of the step + durable write)"
    report.goals.append(goal(what, ratios([one.sealed for one in found], floor), 1.2))
    report.show(options)


if __name__ == "__main__":
    main()
