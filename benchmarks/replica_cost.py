"""What a replica of another node's share takes from the training that goes on beside it.

Two nodes' memory tiers in a process of its own: one serves, the other brings its share over
loopback, hashes and seals it, with the real threads at their real priority. Both ends take their
share of the same cores, so both count; ``beside.py`` has the rest.
"""

from __future__ import annotations

import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from beside import Beside, counter, in_turns, tell
from harness import Options, Places, Report, places, read_options
from ranks import run_ranks

from tests.checkpoints import open_job

SAVE = -1


def replicate_when_told(
    pipe: Connection, directory: str, memory: str, megabytes: float, steps: Synchronized[int]
) -> None:
    """Two nodes: for a number one of them brings the other's share, and the CPU seconds of both are
    answered; ``SAVE`` has them save another one."""
    from elastic_ckpt.jobdir.paths import JobDirectory
    from elastic_ckpt.journal.node_events import Replicated
    from elastic_ckpt.supervisor.saves.drainer import be_polite
    from elastic_ckpt.supervisor.saves.replicator import Replicator
    from tests.node_memories import NodeMemories

    made: list[Any] = []
    journal: Any = SimpleNamespace(write=made.append)
    nodes = NodeMemories(JobDirectory(Path(directory)), Path(memory), 2, be_polite=be_polite)
    replicator = Replicator(
        nodes.tiers[0], journal, print, lambda: None, be_polite, lambda: steps.value
    )
    step = 0
    try:
        while word := pipe.recv():
            used = time.process_time()
            if word == SAVE:
                step += 1
                for tier in nodes.tiers:  # nothing drains here
                    for one in tier.sealed():
                        one.generation.clear()
                nodes.save(step, size=int(megabytes * 1e6))
            else:
                replicator.serve(sealed=True)
                while not made:
                    time.sleep(0.02)
                    replicator.serve(sealed=False)
                if not isinstance(made.pop(), Replicated):
                    raise RuntimeError("no replica was made")
            pipe.send(time.process_time() - used)
    finally:
        replicator.close()
        nodes.close()


def contest(rank: int, options: Options, where: Places) -> dict[str, list[float]]:
    """Seconds of each block, and of a replica."""
    if rank:
        return in_turns(options, None, None, lambda _: None)
    root = where.disk / "job"
    open_job(root)
    done = counter()
    nodes = Beside(replicate_when_told, str(root), str(where.memory), options.megabytes, done)

    def prepare(_: int) -> None:
        nodes.begin(SAVE)
        nodes.cpu_seconds()

    try:
        return in_turns(options, nodes, done, prepare)
    finally:
        nodes.close()


def main() -> None:
    """Print the table."""
    options = read_options(__doc__, megabytes=500.0)
    with places(options.directory) as where:
        found = run_ranks(contest, where.disk / "log", options, where)[0]
    title = f"Training seconds lost to one replica of {options.megabytes:.0f} MB, 2 ranks"
    report = Report("replica_cost", title, {"megabytes": options.megabytes})
    tell(report, found, "a replica").show(options)


if __name__ == "__main__":
    main()
