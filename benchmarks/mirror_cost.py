"""What a mirror takes from the training that goes on beside it.

Two ranks train in blocks of steps that keep both cores busy. In turns: a block with nothing beside
it, and one beside the real mirror, which copies a checkpoint that was just sealed into a bucket.
The bucket is a directory, so that no server takes its share of the cores. The mirror runs in a
process of its own, and sees the steps, as in the supervisor. What is lost is a block's time less
that of the block without anything in the same pass; a ratio is to the processor time that the
mirror itself used.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from drain_cost import Beside, train
from harness import Options, Places, Report, Row, goal, places, read_options, summary
from ranks import run_ranks

from tests.checkpoints import make_checkpoint, open_job

STEPS = 400
QUICK_STEPS = 20
NOTHING = "nothing beside it"
MIRROR = "a copy into a bucket"


def mirror_when_told(pipe: Connection, directory: str, url: str, steps: Synchronized[int]) -> None:
    """A mirror: for each step number it copies that checkpoint, and answers its CPU seconds."""
    from elastic_ckpt.checkpoint.bucket.object_store import open_store
    from elastic_ckpt.checkpoint.bucket.url import BucketUrl
    from elastic_ckpt.jobdir.paths import JobDirectory
    from elastic_ckpt.journal.journal import Journal
    from elastic_ckpt.supervisor.saves.mirror import Mirror
    from elastic_ckpt.supervisor.settings import MirrorSettings, RunSettings

    job = JobDirectory(Path(directory))
    settings = RunSettings(
        directory=job.root, script=Path("train.py"), args=(), name="job", node="node",
        mirror=MirrorSettings(url),
    )  # fmt: skip
    mirror = Mirror(
        settings, open_store(BucketUrl.parse(url), make=True), "run", Journal(job, "node"),
        lambda: steps.value, print, lambda: None, lambda: None,
    )  # fmt: skip
    mirror.start()
    while number := pipe.recv():
        used, done = time.process_time(), f"step {number}, sealed"
        while done not in mirror.serve(number):
            time.sleep(0.05)
        pipe.send(time.process_time() - used)
    mirror.close(lambda: 10.0)


def contest(rank: int, options: Options, where: Places) -> dict[str, list[float]]:
    """Seconds of each block by name; under ``cpu`` those of the mirror itself."""
    import torch.distributed as dist

    from elastic_ckpt.jobdir.paths import JobDirectory

    mirror, done = None, None
    if rank == 0:
        open_job(where.disk / "job")
        done = multiprocessing.get_context("spawn").Value("q", 0)
        places_ = (str(where.disk / "job"), f"file://{where.disk}/bucket")
        mirror = Beside(mirror_when_told, *places_, done)
    steps = QUICK_STEPS if options.quick else STEPS
    found: dict[str, list[float]] = {NOTHING: [], MIRROR: [], "cpu": [], "within": []}
    try:
        for turn in range(1, options.repeats + 2):
            if mirror is not None:
                data = {f"modeling/{n}": bytes(int(options.megabytes * 2.5e5)) for n in range(4)}
                job = JobDirectory(where.disk / "job")
                make_checkpoint(job, turn, contents=data, durable=True)
            for name in (NOTHING, MIRROR):
                dist.barrier()
                if name == MIRROR and mirror is not None:
                    mirror.begin(turn)
                seconds = train(steps, done)
                used, within = 0.0, False
                if name == MIRROR and mirror is not None:
                    within = mirror.finished()
                    used = mirror.cpu_seconds()
                if turn > 1:
                    found[name].append(seconds)
                    if name == MIRROR:
                        found["cpu"].append(used)
                        found["within"].append(float(within))
    finally:
        if mirror is not None:
            mirror.close()
    return found


def main() -> None:
    """Print the table."""
    options = read_options(__doc__, megabytes=500.0)
    with places(options.directory) as where:
        found = run_ranks(contest, where.disk / "log", options, where)[0]
    used = found["cpu"]
    lost = [one - base for one, base in zip(found[MIRROR], found[NOTHING], strict=True)]
    title = f"Training seconds lost to one copy of {options.megabytes:.0f} MB, 2 ranks"
    report = Report("mirror_cost", title, {"megabytes": options.megabytes})
    report.rows = [
        summary("a block with nothing beside it", found[NOTHING]),
        summary("the mirror's own CPU seconds, the floor", used, used),
        Row(**{**vars(summary(f"lost to: {MIRROR}", lost)),
               "ratio": statistics.median(lost) / statistics.median(used)}),
    ]  # fmt: skip
    if min(found["within"]) < 1:
        report.notes.append("not every copy ended within its block: give it more steps")
    figures = [one / base for one, base in zip(lost, used, strict=True)]
    what = "training seconds lost to one copy / the mirror's own CPU seconds"
    report.goals.append(goal(what, figures, 1.2))
    report.show(options)


if __name__ == "__main__":
    main()
