"""A node of four vanishes: elastic-ckpt and torchrun with a shared disk, side by side.

Hosts are network namespaces of this machine; needs root. The same script trains the same state,
under ``elastic-ckpt run`` with a Session, and under torchrun with its own save by rank 0 to a disk
that all hosts share. In turns, one host that is not the first is switched off, and the clock runs
until every rank of those that are left has finished a step. Both may go on with three nodes; both
wait 3 s for a fourth one.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Options, Places, Report, goal, places, progress, ratios, read_options, summary
from jobs import SCRIPT

from tests.cluster import Node
from tests.hosts import Hosts, why_not
from tests.job import environment

NODES = 4
EVERY = 10
LIMIT_SECONDS = 180.0
OURS, PEER = "elastic-ckpt run", "torchrun, a shared disk"


class Step(NamedTuple):
    """The end of a step on one rank, on this machine's monotonic clock."""

    number: int
    time: float
    pid: int


class TorchrunNode(Node):
    """One host's torchrun."""

    def start(self, *options: str) -> TorchrunNode:
        command = [
            *self.prefix, sys.executable, "-m", "torch.distributed.run",
            "--nnodes", f"{NODES - 1}:{NODES}", "--nproc-per-node", "1", "--max-restarts", "10",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "h1:29400", "--rdzv-id", "job",
            "--rdzv-conf", "last_call_timeout=3", "--local-addr", self.name, *options,
            str(SCRIPT), "--plain", str(self.root / "last.pt"), *self.arguments,
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment()
            )
        return self


class Jobs(Hosts):
    """Four hosts, a rank each."""

    def __init__(self, root: Path, size: float) -> None:
        options = ("--save-interval", str(EVERY), "--rdzv-timeout", "60")
        super().__init__(NODES, root, f"{NODES - 1}:{NODES}", options=options)
        self.arguments = [
            "--trace", str(root / "trace"), "--size", str(size), "--light", "--pause", "0.1",
            "--every", str(EVERY),
        ]  # fmt: skip
        self.script = SCRIPT

    def steps(self) -> list[list[Step]]:
        """Of each rank, in order."""
        found = []
        for rank in range(NODES):
            path = self.root / f"trace.{rank}"
            words = (
                [line.split() for line in path.read_text().splitlines()] if path.exists() else []
            )
            found.append([Step(int(a), float(b), int(c)) for a, b, c in words if c])
        return found

    def lose_one(self) -> tuple[float, int]:
        """Seconds from the end of a host to the next step of all ranks, and steps made again."""
        self.start(*self.names)
        self._until(lambda: all(one and one[-1].number >= 2 * EVERY + 3 for one in self.steps()))
        before = self.steps()
        old, last = (
            {one.pid for rank in before for one in rank},
            max(one[-1].number for one in before),
        )
        began = time.monotonic()
        self.lose(self.names[-2])

        def firsts() -> list[Step]:
            new = [next((one for one in rank if one.pid not in old), None) for rank in self.steps()]
            return [one for one in new[: NODES - 1] if one is not None]

        self._until(lambda: len(firsts()) == NODES - 1)
        found = firsts()
        return max(one.time for one in found) - began, max(0, last + 1 - found[0].number)

    def _until(self, condition) -> None:
        limit = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if time.monotonic() > limit:
                raise TimeoutError(f"not within {LIMIT_SECONDS:.0f} s:\n{self.output()}")
            time.sleep(0.05)


class TorchrunJobs(Jobs):
    """The same under torchrun."""

    def make(self, name: str) -> Node:
        node = TorchrunNode(self, name)
        node.prefix = super().make(name).prefix
        return node

    def start(self, *names: str) -> None:
        for name in names:
            self.nodes[name] = self.make(name).start()


def measure(options: Options, where: Places) -> Report:
    """Take turns, and compare."""
    seconds: dict[str, list[float]] = {OURS: [], PEER: []}
    again: dict[str, list[float]] = {OURS: [], PEER: []}
    for turn in range(options.repeats):
        for number, (name, kind) in enumerate(((OURS, Jobs), (PEER, TorchrunJobs))):
            progress(f"pass {turn + 1}: {name}")
            with kind(where.disk / f"{number}-{turn}", options.megabytes) as jobs:
                took, repeated = jobs.lose_one()
            seconds[name].append(took)
            again[name].append(float(repeated))
    title = f"A node of {NODES} vanishes, {options.megabytes:.0f} MB, saved every {EVERY} steps"
    report = Report("nodes_peers", title, {"megabytes": options.megabytes})
    report.rows = [
        summary(f"{PEER}: until all ranks have finished a step", seconds[PEER], seconds[PEER]),
        summary(f"{OURS}: the same", seconds[OURS], seconds[PEER]),
        summary(f"{PEER}: steps made again", again[PEER], unit=""),
        summary(f"{OURS}: steps made again", again[OURS], unit=""),
    ]
    figures = ratios(seconds[OURS], seconds[PEER])
    report.goals = [goal(f"{OURS} / {PEER}", figures, 1.0)]
    return report


def main() -> None:
    """Measure, print, and write the JSON."""
    options = read_options(__doc__, megabytes=50.0, repeats=3)
    if reason := why_not():
        print(f"skipped: {reason}")
        return
    with places(options.directory) as where:
        measure(options, where).show(options)


if __name__ == "__main__":
    main()
