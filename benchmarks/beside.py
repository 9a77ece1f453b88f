"""Work in a process of its own beside two ranks that train, and what it takes from them.

The ranks train in blocks of steps that keep both cores busy, in turns with nothing beside them and
with the work. What is lost is a block's time less that of the block without anything in the same
pass; a ratio is to the processor time that the work itself used.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from harness import Options, Report, Row, goal, summary

STEPS = 400
QUICK_STEPS = 20
NOTHING = "nothing beside it"
WORK = "the work beside it"
WAIT_SECONDS = 120.0
MIN_CPU_SECONDS = 0.001


class Beside:
    """Rank 0's handle on a process that works beside training, when it is told to."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        """``target`` gets a pipe and ``args``: for each word it answers the CPU seconds that its
        work took, until the word is 0."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *args))
        self._process.start()

    def begin(self, word: int = 1) -> None:
        """Have it work."""
        self._pipe.send(word)

    def finished(self) -> bool:
        """Whether it is through."""
        return self._pipe.poll()

    def cpu_seconds(self) -> float:
        """What it used; waits for it."""
        if not self._pipe.poll(WAIT_SECONDS):
            raise TimeoutError("it did not end")
        used: float = self._pipe.recv()
        return used

    def close(self) -> None:
        """End it."""
        self._pipe.send(0)
        self._process.join(20)


def train(steps: int, done: Any = None) -> float:
    """Seconds of a block: each step is some arithmetic and an all-reduce; ``done`` counts them."""
    import torch
    import torch.distributed as dist

    left, right = torch.ones(384, 384), torch.ones(384, 384)
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        for _ in range(8):
            left = (left @ right).clamp_(max=1.0)
        dist.all_reduce(left[:8, :8].contiguous())
        if done is not None:
            done.value += 1
    dist.barrier()
    return time.perf_counter() - began


def counter() -> Synchronized[int]:
    """Counts the steps, for the work to see."""
    return multiprocessing.get_context("spawn").Value("q", 0)


def in_turns(
    options: Options, work: Beside | None, done: Any, prepare: Callable[[int], None]
) -> dict[str, list[float]]:
    """Seconds of each block by name, on each rank; the first passes are dropped.

    Under ``cpu`` are the seconds of the work itself, under ``within`` whether it ended within its
    block, on the rank that has it.

    Args:
        prepare: called just before the work, with the pass's number from 1, which is its word.
    """
    import torch.distributed as dist

    steps = QUICK_STEPS if options.quick else STEPS
    found: dict[str, list[float]] = {NOTHING: [], WORK: [], "cpu": [], "within": []}
    for turn in range(1, options.repeats + 2):
        for name in (NOTHING, WORK):
            dist.barrier()
            is_beside = name == WORK and work is not None
            if is_beside:
                prepare(turn)  # not earlier: it may begin by itself
                work.begin(turn)
            seconds = train(steps, done)
            if is_beside:
                within = work.finished()
                used = work.cpu_seconds()
            if turn == 1:
                continue
            found[name].append(seconds)
            if is_beside:
                found["cpu"].append(used)
                found["within"].append(float(within))
    return found


def tell(report: Report, found: dict[str, list[float]], what: str) -> Report:
    """Add the rows and the goal: at most 1.2 seconds of training for one of the work."""
    # What began by itself, before it was told to, says nothing.
    valid = [turn for turn, used in enumerate(found["cpu"]) if used >= MIN_CPU_SECONDS]
    if len(valid) < len(found["cpu"]):
        report.notes.append(f"{len(found['cpu']) - len(valid)} passes left out: it began early")
    if not valid:
        raise RuntimeError(f"{what} was made at another time in every pass")
    used = [found["cpu"][turn] for turn in valid]
    lost = [found[WORK][turn] - found[NOTHING][turn] for turn in valid]
    report.rows += [
        summary("a block with nothing beside it", found[NOTHING]),
        summary(f"CPU seconds of {what}, the floor", used, used),
        Row(**{**vars(summary(f"lost to {what}", lost)),
               "ratio": statistics.median(lost) / statistics.median(used)}),
    ]  # fmt: skip
    if min(found["within"]) < 1:
        report.notes.append("not every one ended within its block: give it more steps")
    ratios = [one / base for one, base in zip(lost, used, strict=True)]
    report.goals.append(goal(f"training seconds lost to {what} / its CPU seconds", ratios, 1.2))
    return report
