"""What a drain takes from the training that goes on beside it.

Two ranks train in blocks of 200 steps and more that keep both cores busy. In turns: a block with
nothing beside it, one beside the drain of a checkpoint that was just saved to memory, and one
beside what DCP's asynchronous save does after its stall. The drain runs in a process of its own at
the lowest priority, as the supervisor's does. What is lost is a block's time less that of the block
without anything in the same pass; a stall is not in it. A ratio is to the processor time that the
drain itself used.
"""

from __future__ import annotations

import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
from beside import NOTHING, Beside, train
from harness import Options, Places, Report, Row, goal, places, read_options, summary
from ranks import run_ranks

STEPS = 200
QUICK_STEPS = 20
OURS = "drain of the memory tier"
DCP = "DCP async, thread"


def drain_when_told(pipe: Connection, job: str, tier: str) -> None:
    """A drainer: for each word it drains the newest generation and answers its CPU seconds."""
    from elastic_ckpt.checkpoint.disk.tier import DiskTier
    from elastic_ckpt.checkpoint.memory.drain import drain
    from elastic_ckpt.checkpoint.memory.tier import MemoryTier
    from elastic_ckpt.jobdir.paths import JobDirectory

    os.nice(19)
    psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    while pipe.recv():
        used = time.process_time()
        for newest in MemoryTier(Path(tier)).sealed()[:1]:
            for _ in drain(newest, DiskTier(JobDirectory(Path(job)))):
                pass
        pipe.send(time.process_time() - used)


def contest(rank: int, options: Options, where: Places) -> dict[str, list[float]]:
    """Seconds of each block by name; under ``cpu`` those of the drain itself."""
    import torch.distributed as dist
    from savers import DcpAsync, OursMemory
    from training_state import make_state

    state = make_state(options.megabytes, wrap=True)
    ours, theirs = (kind(rank, state, where) for kind in (OursMemory, DcpAsync))
    drain = (drain_when_told, str(ours.job.root), str(ours.memory.root)) if rank == 0 else ()
    drainer = Beside(*drain) if drain else None
    steps = QUICK_STEPS if options.quick else STEPS
    found: dict[str, list[float]] = {NOTHING: [], OURS: [], DCP: [], "cpu": [], "within": []}
    try:
        for turn in range(options.repeats + 1):
            for name in (NOTHING, OURS, DCP):
                if name == OURS:
                    ours.save(turn + 1)
                if name == DCP:
                    theirs.save(turn + 1)
                dist.barrier()
                if name == OURS and drainer is not None:
                    drainer.begin()
                seconds = train(steps)
                if turn:
                    found[name].append(seconds)
                if name == OURS and drainer is not None:
                    within = drainer.finished()
                    used = drainer.cpu_seconds()
                    if turn:
                        found["within"].append(float(within))
                        found["cpu"].append(used)
                if name == OURS:
                    ours.settle()
                if name == DCP:
                    theirs.settle()
                if rank == 0:
                    os.sync()
    finally:
        if drainer is not None:
            drainer.close()
        ours.close()
    return found


def main() -> None:
    """Print the table."""
    options = read_options(__doc__)
    with places(options.directory) as where:
        found = run_ranks(contest, where.disk / "log", options, where)[0]
    used = found["cpu"]
    lost = {
        name: [one - base for one, base in zip(found[name], found[NOTHING], strict=True)]
        for name in (OURS, DCP)
    }
    title = f"Training seconds lost to one drain, {options.megabytes:.0f} MB of state, 2 ranks"
    settings = {"megabytes": options.megabytes, "steps": QUICK_STEPS if options.quick else STEPS}
    report = Report("drain_cost", title, settings)
    report.rows = [
        summary("a block with nothing beside it", found[NOTHING]),
        summary("the drain's own CPU seconds, the floor", used, used),
        Row(**{**vars(summary(f"lost to: {OURS}", lost[OURS])),
               "ratio": statistics.median(lost[OURS]) / statistics.median(used)}),
        Row(**{**vars(summary(f"lost to: {DCP}", lost[DCP])),
               "ratio": statistics.median(lost[DCP]) / statistics.median(used)}),
    ]  # fmt: skip
    if min(found["within"]) < 1:
        report.notes.append("not every drain ended within its block: give it more steps")
    figures = [one / base for one, base in zip(lost[OURS], used, strict=True)]
    what = "training seconds lost to one drain / the drain's own CPU seconds"
    report.goals.append(goal(what, figures, 1.2))
    report.show(options)


if __name__ == "__main__":
    main()
