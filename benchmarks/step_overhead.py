"""What a step costs a rank while nothing is asked of it.

Times what a Session tells a board in shared memory in a step of one micro-batch: that it enters the
step, fetches, and trains, and how long its own work took. In rounds that alternate with two floors:
an empty method with the same arguments, and the same method writing one word of shared memory with
the time of day in it, which is the least that a rank which is to be seen must do. Prints
microseconds, ratios, and by how much the process grew. The goal is 5 microseconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Phase, SlotWriter
from elastic_ckpt.training.data.consumption import Consumption
from elastic_ckpt.training.step import StepProtocol
from elastic_ckpt.training.step_timer import StepTimer

GOAL_MICROSECONDS = 5.0
SUBJECT = "a step of a Session"


class Empty:
    """A call that does nothing."""

    def enter(self, finished: int, epoch: int = 0, samples: int = 0) -> None:
        """Nothing."""


class Step:
    """What a Session does for a step of one micro-batch."""

    def __init__(self, protocol: StepProtocol, slot: SlotWriter) -> None:
        self._protocol = protocol
        self._slot = slot
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters())
        consumption = self._consumption = Consumption()
        consumption.watch(optimizer)
        consumption.begin()
        self._stepped = next(reversed(optimizer._optimizer_step_post_hooks.values()))
        self._timer = StepTimer(slot, model, consumption=consumption)

    def enter(self, finished: int, epoch: int = 0, samples: int = 0) -> None:
        """Enter the step, fetch, train; the hooks of the gradient and of the optimizer included."""
        timer, slot = self._timer, self._slot
        self._protocol.enter(finished, epoch, samples)
        slot.phase(Phase.FETCHING)
        timer.fetching()
        timer.fetched()
        slot.phase(Phase.TRAINING)
        self._consumption.handed += 1
        timer.handed_out()
        timer.gradient_ready()
        timer.optimizing()
        self._stepped(None, None, None)
        timer.taken_back()
        timer.stepped()


class OneWord:
    """A call that tells others the least: a time."""

    def __init__(self, board: Board) -> None:
        self._words = board._words

    def enter(self, finished: int, epoch: int = 0, samples: int = 0) -> None:
        """One store."""
        self._words[-1] = time.monotonic_ns()


def measure(enter: Callable[[int, int, int], object], steps: int) -> float:
    """Microseconds per call."""
    began = time.perf_counter()
    for step in range(steps):
        enter(step, 3, step)
    return (time.perf_counter() - began) / steps * 1e6


def main() -> None:
    """Print a table, and with --json one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    board = Board.create(2)
    slot = board.rank_slot(0)
    protocol = StepProtocol(board, slot)
    protocol.attach(0)
    subjects = {
        "empty call": Empty().enter,
        "one word and the time": OneWord(Board.create(1)).enter,
        SUBJECT: Step(protocol, slot).enter,
    }
    for enter in subjects.values():
        measure(enter, args.steps)  # caches, and memory that the first calls take
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rounds = [
        {name: measure(enter, args.steps) for name, enter in subjects.items()}
        for _ in range(args.rounds)
    ]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    medians = {name: statistics.median(row[name] for row in rounds) for name in subjects}
    ours = medians[SUBJECT]
    ratios = {
        name: statistics.median(row[SUBJECT] / row[name] for row in rounds)
        for name in list(subjects)[:2]
    }
    if args.json:
        print(json.dumps({"microseconds": medians, "ratios": ratios, "grown_kib": grown}))
        return
    print(f"{args.rounds} rounds of {args.steps} steps, medians")
    for name, value in medians.items():
        ratio = f"  x {ratios[name]:.1f} = a step" if name in ratios else ""
        print(f"  {name:<24}{value:7.3f} us{ratio}")
    verdict = "met" if ours <= GOAL_MICROSECONDS else "MISSED"
    print(f"  goal {GOAL_MICROSECONDS} us per step: {verdict}; memory grew by {grown} KiB")


if __name__ == "__main__":
    main()
