"""A node of four vanishes: elastic-ckpt, torchrun and NVRx with a shared disk, side by side.

Hosts are network namespaces of this machine; needs root. The same script trains the same state,
under ``elastic-ckpt run`` with a Session, and under the others' launchers with its own save by rank
0 to a disk that all hosts share; NVRx's only where it is installed. In turns, one host that is not
the first is switched off, and the clock runs until every rank of those that are left has finished a
step. All may go on with three nodes, and wait 3 s for a fourth one.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
OURS = "elastic-ckpt run"
PEERS = {
    "torchrun": ("torch.distributed.run",),
    "NVRx ft_launcher": (
        "nvidia_resiliency_ext.fault_tolerance.launcher", "--ignore-missing-fault-tol-cfg",
    ),
}  # fmt: skip
"""Modules and their own options."""


class Step(NamedTuple):
    """The end of a step on one rank, on this machine's monotonic clock."""

    number: int
    time: float
    pid: int


class PeerNode(Node):
    """One host's launcher."""

    launcher: Sequence[str] = ()

    def start(self, *options: str) -> PeerNode:
        command = [
            *self.prefix, sys.executable, "-m", *self.launcher,
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

    def _until(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if time.monotonic() > limit:
                raise TimeoutError(f"not within {LIMIT_SECONDS:.0f} s:\n{self.output()}")
            time.sleep(0.05)


class PeerJobs(Jobs):
    """The same under another launcher."""

    def __init__(self, root: Path, size: float, launcher: Sequence[str]) -> None:
        super().__init__(root, size)
        self._launcher = launcher

    def make(self, name: str) -> Node:
        node = PeerNode(self, name)
        node.launcher = self._launcher
        node.prefix = super().make(name).prefix
        return node

    def start(self, *names: str) -> None:
        for name in names:
            self.nodes[name] = self.make(name).start()


def measure(options: Options, where: Places) -> Report:
    """Take turns, and compare."""
    peers = {name: words for name, words in PEERS.items() if is_installed(words[0])}
    seconds: dict[str, list[float]] = {OURS: [], **{name: [] for name in peers}}
    again: dict[str, list[float]] = {name: [] for name in seconds}
    for turn in range(options.repeats):
        for number, name in enumerate(seconds):
            progress(f"pass {turn + 1}: {name}")
            root = where.disk / f"{number}-{turn}"
            jobs = (
                PeerJobs(root, options.megabytes, peers[name])
                if name in peers
                else Jobs(root, options.megabytes)
            )
            with jobs:
                took, repeated = jobs.lose_one()
            seconds[name].append(took)
            again[name].append(float(repeated))
    title = f"A node of {NODES} vanishes, {options.megabytes:.0f} MB, saved every {EVERY} steps"
    report = Report("nodes_peers", title, {"megabytes": options.megabytes})
    floor = seconds["torchrun"]
    report.rows = [
        summary(f"until all ranks have finished a step: {name}", found, floor)
        for name, found in seconds.items()
    ] + [summary(f"steps made again: {name}", found, unit="") for name, found in again.items()]
    for name in peers:
        figures = ratios(seconds[OURS], seconds[name])
        report.goals.append(goal(f"{OURS} / {name}", figures, 1.0))
    return report


def is_installed(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


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
