"""What an exchange between ranks costs the job's store: calls, CPU time, and how long it takes.

Ranks are threads of this process, each with connections of its own to a store in another process.
They call ``Peers.collect``, all at once or with one rank that is late, for which the others wait.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from harness import Report, goal, progress, read_options, summary

from elastic_ckpt.training.ranks.peers import Peers

COUNTS = (2, 8, 64)
QUICK_COUNTS = (2, 8)
LATE_SECONDS = 0.5
LIMIT_SECONDS = 60.0
CALLS = {"set": 1, "check": 1, "delete_key": 1, "wait": 1, "get": 2, "multi_get": 2}
"""Requests that torch's client sends for each call: it waits for keys before it reads them."""

GOAL_CALLS = 5.0


class CountedStore:
    """A connection that counts what the store has to serve."""

    def __init__(self, port: int) -> None:
        from torch import distributed

        self._store: Any = distributed.TCPStore(
            "127.0.0.1", port, is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=LIMIT_SECONDS),
        )  # fmt: skip
        self.requests = 0

    def __getattr__(self, name: str) -> Any:
        self.requests += CALLS.get(name, 0)
        return getattr(self._store, name)


def host(pipe: Connection) -> None:
    """The process of the store; it reports its CPU seconds."""
    from torch import distributed

    stores: Any = distributed
    store = stores.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    while pipe.recv():
        pipe.send(time.process_time())


class Ranks:
    """Ranks in threads."""

    def __init__(self, count: int, port: int) -> None:
        self.stores: list[CountedStore] = []
        self.failures: list[Exception] = []

        def connect() -> CountedStore:
            self.stores.append(CountedStore(port))
            return self.stores[-1]

        self.peers = [
            Peers(rank, count, connect(), LIMIT_SECONDS, connect) for rank in range(count)
        ]
        self.collect(1, 0.0)  # makes the connections

    def collect(self, rounds: int, late: float) -> float:
        """Exchange this many times, the last rank ``late`` by so many seconds; seconds of each."""
        threads = [
            threading.Thread(target=self._enter, args=(one, rounds, late)) for one in self.peers
        ]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * LIMIT_SECONDS)
        if self.failures:
            raise self.failures[0]
        return (time.perf_counter() - began) / rounds

    def _enter(self, peers: Peers, rounds: int, late: float) -> None:
        def produce() -> bytes:
            if late and peers.rank == peers.world_size - 1:
                time.sleep(late)
            return bytes(200)

        try:
            for number in range(rounds):
                peers.collect(f"round {number}", produce)
        except Exception as error:
            self.failures.append(error)

    @property
    def requests(self) -> int:
        """What the store has served so far."""
        return sum(store.requests for store in self.stores)


Figures = tuple[float, float, float]


def measure(count: int, rounds: int, late: float) -> Figures:
    """Of one exchange: milliseconds beyond the late rank's, the store's requests for each rank, and
    its CPU milliseconds."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=host, args=(theirs,), daemon=True)
    process.start()
    try:
        if not pipe.poll(LIMIT_SECONDS):
            raise RuntimeError("the store's process does not start")
        ranks = Ranks(count, pipe.recv())
        used, served = _cpu(pipe), ranks.requests
        took = ranks.collect(rounds, late)
        cpu = (_cpu(pipe) - used) / rounds
        return 1e3 * (took - late), (ranks.requests - served) / rounds / count, 1e3 * cpu
    finally:
        process.kill()
        process.join(10)


def _cpu(pipe: Connection) -> float:
    pipe.send(True)
    if not pipe.poll(LIMIT_SECONDS):
        raise RuntimeError("the store's process does not answer")
    return float(pipe.recv())


def main() -> None:
    """Print the table."""
    options = read_options(__doc__, repeats=3)
    counts = QUICK_COUNTS if options.quick else COUNTS
    rounds = 5 if options.quick else 50
    report = Report("exchanges", "An exchange of all ranks", {"counts": counts, "rounds": rounds})
    requests: Sequence[float] = ()
    for count in counts:
        for late in (0.0, LATE_SECONDS):
            what = f"{count} ranks" + (f", one {late:g} s late" if late else "")
            figures = []
            for turn in range(options.repeats):
                progress(f"{what}, pass {turn + 1} of {options.repeats}")
                figures.append(measure(count, 2 if late else rounds, late))
            took, requests, cpu = zip(*figures, strict=True)
            more = {"requests per rank": requests, "store's CPU ms": cpu}
            report.rows.append(summary(what, took, unit="ms", more=more))
    what = f"requests of a rank, {counts[-1]} ranks, one late"
    report.goals.append(goal(what, requests, GOAL_CALLS))
    report.show(options)


if __name__ == "__main__":
    main()
