"""What the digests cost that ``elastic-ckpt replay`` compares: ``run --digests 100``.

In turns a model is trained for a step, its state is hashed once in one go, which is the floor, and
its digests are noted as a Session does every so many steps.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import xxhash
from harness import Options, Places, Report, goal, places, ratios, read_options, summary
from torch import nn

from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.training.digests import DigestChain, named_state

WIDTH = 1024
STATE = 3
"""The parameters and AdamW's two moments."""

EVERY = 100


class Training:
    """A stack of layers whose state, with the optimizer's, has so many MB."""

    def __init__(self, megabytes: float) -> None:
        torch.manual_seed(1)
        layers = max(1, round(megabytes * 1e6 / (4 * STATE * WIDTH * WIDTH)))
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.inputs = torch.randn(64, WIDTH)

    def step(self) -> None:
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> list[Any]:
        return [one.reshape(-1) for _, one in named_state(self.model, self.optimizer)]


def seconds(do: Any) -> float:
    """Return how long a call takes."""
    began = time.monotonic()
    do()
    return time.monotonic() - began


def hash_once(tensors: list[Any]) -> None:
    """Hash all bytes in one go."""
    digest = xxhash.xxh3_64()
    for one in tensors:
        digest.update(one.numpy())


def measure(options: Options, where: Places) -> Report:
    """Take turns, and compare."""
    job = JobDirectory(where.disk / "job")
    job.prepare()
    training = Training(options.megabytes)
    training.step()
    journal = Journal(job, "here", rank=0)
    chain = DigestChain(1, job, journal, 0, training.model, training.optimizer)
    steps, floors, digests = [], [], []
    for turn in range(options.repeats + 1):  # the first one does not count
        found = (
            seconds(training.step),
            seconds(lambda: hash_once(training.tensors())),
            seconds(lambda turn=turn: chain.note(Position(step=turn + 1), 0.5)),
        )
        for kept, one in zip((steps, floors, digests), found, strict=True):
            kept.extend([one] if turn else [])
    report = Report(
        "digests",
        f"Digests of {options.megabytes:.0f} MB of state",
        {"megabytes": options.megabytes},
    )
    report.rows = [
        summary("a step of training, batch 64", steps),
        summary("one hash of the state's bytes, the floor", floors, floors),
        summary("its digests, noted in the journal", digests, floors),
    ]
    report.goals = [
        goal("digests / one hash", ratios(digests, floors), 1.5),
        goal(
            f"share of the training's time, every {EVERY} steps",
            [100 * one / (EVERY * step) for one, step in zip(digests, steps, strict=True)],
            1.0,
            " %",
        ),
    ]
    return report


def main() -> None:
    """Measure, print, and write the JSON."""
    options = read_options(__doc__, megabytes=600.0, repeats=7)
    with places(options.directory) as where:
        measure(options, where).show(options)


if __name__ == "__main__":
    main()
