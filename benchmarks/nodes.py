"""Several nodes against one: the stall of a save into memory, and a node that vanishes.

Hosts are network namespaces of this machine, each with its own /dev/shm; needs root. In turns the
same state is trained by as many ranks on one host and on one host each, and training waits for
saves into memory. Then a host is switched off, another one takes its place, and the clock runs
until every rank has finished a step from what the other hosts have in memory; what detection takes
of that is the head's own word. Once more with a slow link to the host that takes its place, which
carries the state, and what the script's own DistributedDataParallel sends until then: the model,
and the gradients of a step.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Options, Places, Report, goal, places, progress, ratios, read_options, summary
from jobs import SCRIPT

from tests.hosts import Hosts, why_not

NODES = 4
SAVES = 12
QUICK_SAVES = 4
WARM_UP = 2
ATTEMPTS = 3
LINK_KBIT = 100_000
MODEL = 1 / 3
"""Of the state: the parameters, which DistributedDataParallel sends to each rank when it is made;
the gradients of a step are as large."""

ONE, FOUR = "one node, 4 ranks", "four nodes, a rank each"


class Jobs(Hosts):
    """Hosts that train a state of so many MB."""

    def __init__(self, root: Path, count: int, nnodes: str, size: float, nproc: int = 1) -> None:
        options = ("--save-interval", "10", "--rdzv-timeout", "60")
        super().__init__(count, root, nnodes, nproc=nproc, options=options)
        self.arguments = [
            "--trace", str(root / "trace"), "--size", str(size), "--light", "--pause", "0.1",
        ]  # fmt: skip
        self.script = SCRIPT

    def events(self, kind: str) -> list[dict]:
        """The head's events of a kind, in order."""
        found = (one for one in self.head.events() if one["event"] == kind)
        return [one for one in found if not one["data"].get("follows")]


def stalls(where: Path, nodes: int, options: Options) -> list[float]:
    """Seconds that training waited for each save into memory."""
    count = (QUICK_SAVES if options.quick else SAVES) + WARM_UP
    with Jobs(where, nodes, str(nodes), options.megabytes, nproc=NODES // nodes) as hosts:
        hosts.start(*hosts.names)

        def saved(_=None) -> list[float]:
            found = [one["data"] for one in hosts.events("saved")]
            return [one["stall_seconds"] for one in found if one["tier"] == "memory"]

        hosts.head.until(lambda _: len(saved()) >= count, f"{count} saves", seconds=300)
        return saved()[WARM_UP:]


def lost_node(where: Path, options: Options, kbit: int = 0) -> tuple[float, float]:
    """Seconds from the end of a host to the next step of all ranks, and those to its detection.
    The state must come from memory; a machine that is slow to copy may have it on the disk first,
    and then it is measured anew.

    Args:
        kbit: a second, through the cable of the host that takes its place.
    """
    for attempt in range(ATTEMPTS):
        found = _lost_node(where.with_name(f"{where.name}-{attempt}"), options, kbit)
        if found is not None:
            return found
    raise SystemExit(f"the state was loaded from the disk {ATTEMPTS} times in a row")


def _lost_node(where: Path, options: Options, kbit: int) -> tuple[float, float] | None:
    with Jobs(where, 3, "2", options.megabytes) as hosts:
        hosts.start("h1", "h2")
        hosts.until_step(2, 12)
        hosts.start("h3")  # a spare: it waits for its turn
        hosts.head.until(lambda _: len(hosts.events("node_joined")) >= 3, "the spare", seconds=120)
        before = len(hosts.events("replicated"))
        hosts.head.until(
            lambda _: (
                len(hosts.events("replicated")) > before
                and newest(hosts, "replicated") >= newest(hosts, "saved")
            ),
            "a replica of the newest save",
        )
        if kbit:
            hosts.link("h3").slow_down(kbit)
        incarnation = hosts.head.view().incarnation
        began = time.monotonic()
        hosts.lose("h2")
        stepped = hosts.until_stepped(incarnation + 1)
        known = next(one["monotonic"] for one in hosts.events("ended") if one["monotonic"] > began)
        hosts.head.until(lambda _: hosts.events("loaded"), "the word of a load")
        tiers = [one["data"]["tier"] for one in hosts.events("loaded")]
        return (stepped - began, known - began) if tiers == ["memory"] else None


def newest(hosts: Jobs, event: str) -> int:
    """Return the last step that an event is of."""
    return max((one["data"]["step"] for one in hosts.events(event)), default=0)


def measure(options: Options, where: Places) -> Report:
    """Take turns, and compare."""
    found: dict[str, list[float]] = {ONE: [], FOUR: []}
    lost, detected, slow = [], [], []
    for turn in range(options.repeats):
        for name, nodes in ((ONE, 1), (FOUR, NODES)):
            progress(f"pass {turn + 1}: {name}")
            found[name].append(
                statistics.median(stalls(where.disk / f"{nodes}-{turn}", nodes, options))
            )
        progress(f"pass {turn + 1}: a lost node")
        whole, known = lost_node(where.disk / f"lost-{turn}", options)
        lost.append(whole)
        detected.append(known)
        progress(f"pass {turn + 1}: a lost node, and a slow link")
        whole, known = lost_node(where.disk / f"slow-{turn}", options, LINK_KBIT)
        slow.append(whole - known)
    link = options.megabytes * (1 + 2 * MODEL) * 8e3 / LINK_KBIT
    beyond = [whole - known for whole, known in zip(lost, detected, strict=True)]
    title = f"A job of {options.megabytes:.0f} MB of state on several nodes, {NODES} ranks"
    report = Report("nodes", title, {"megabytes": options.megabytes})
    report.rows = [
        summary(f"stall of a save into memory: {ONE}, the floor", found[ONE], found[ONE]),
        summary(f"stall of a save into memory: {FOUR}", found[FOUR], found[ONE]),
        summary("a node vanishes: until that is detected", detected),
        summary("from there until all ranks have finished a step", beyond),
        summary(
            "the same with a slow link to the host that takes its place", slow, [link] * len(slow)
        ),
    ]
    report.goals = [
        goal("stall per save, four nodes / one node", ratios(found[FOUR], found[ONE]), 1.2),
        goal("a lost node, beyond its detection", beyond, 1.5, " s"),
        goal(
            f"with a link of {LINK_KBIT // 1000} Mbit/s / what it carries",
            [one / link for one in slow],
            1.2,
        ),
    ]
    return report


def main() -> None:
    """Measure, print, and write the JSON."""
    options = read_options(__doc__, megabytes=200.0, repeats=3)
    if reason := why_not():
        print(f"skipped: {reason}")
        return
    with places(options.directory) as where:
        measure(options, where).show(options)


if __name__ == "__main__":
    main()
