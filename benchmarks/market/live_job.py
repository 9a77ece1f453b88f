"""The market's job on torchft: each host is a replica that heals from the others while it trains.

torchft keeps no checkpoints; as its examples do, the first replica saves every so often, for when
all are gone. Replicas take turns through the data by what the state says was used, so that nothing
depends on which of them are there.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from market.job import BATCH, Job, Model, arguments, saved
from torchft import Manager, ProcessGroupGloo

TIMEOUT = timedelta(seconds=5)


class LiveJob(Job):
    """One replica."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.bare = Model(args.size)
        self.optimizer = torch.optim.SGD(self.bare.parameters(), lr=1e-3)
        self.trace = open(f"{args.trace}.0", "a", buffering=1)  # noqa: SIM115
        self.manager = Manager(
            pg=ProcessGroupGloo(timeout=TIMEOUT), min_replica_size=1, use_async_quorum=False,
            load_state_dict=self._take, state_dict=self._give, replica_id=socket.gethostname(),
            timeout=TIMEOUT, hostname=socket.gethostname(),
        )  # fmt: skip

    def run(self) -> None:
        """Train until the market closes."""
        for path in saved(self.args.plain)[-1:]:
            found = torch.load(path, weights_only=True, mmap=True)
            self._take(found)
            self.manager.load_state_dict(found["manager"])
        last = time.monotonic()
        while True:
            closed = self._turn()
            is_first = self.manager.participating_rank() == 0
            if closed:
                if is_first:
                    self.close()
                return
            if is_first and time.monotonic() - last >= self.args.every:
                self.write(self.args.plain, {**self._give(), "manager": self.manager.state_dict()})
                last = time.monotonic()

    def _turn(self) -> bool:
        """One step; whether the market closed for all."""
        manager = self.manager
        manager.start_quorum()  # which heals this replica, if it is behind
        began = time.monotonic()
        rank, count = manager.participating_rank() or 0, manager.num_participants()
        first = self.bare.taken() + rank * BATCH
        samples = torch.arange(first, first + BATCH)
        self.bare(samples.float()).backward()
        grad = self.bare.weight.grad
        assert grad is not None
        manager.allreduce(grad).wait()
        time.sleep(max(0.0, self.args.pause - (time.monotonic() - began)))
        closed = torch.tensor([float(os.path.exists(self.args.end))])
        manager.allreduce(closed).wait()
        if not manager.should_commit():
            self.optimizer.zero_grad()
            return False
        begin = self.bare.taken()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.bare.note(torch.arange(begin, begin + count * BATCH))
        if rank == 0:
            self.tell()
        return bool(closed.item() > 1 - 1e-6)

    def _give(self) -> dict[str, Any]:
        return {"model": self.bare.state_dict(), "optimizer": self.optimizer.state_dict()}

    def _take(self, found: dict[str, Any]) -> None:
        self.bare.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])


def main() -> None:
    """One replica, under ``torchrun --standalone``."""
    args = arguments().parse_args()
    torch.set_num_threads(1)
    args.plain.mkdir(exist_ok=True)
    LiveJob(args).run()


if __name__ == "__main__":
    main()
