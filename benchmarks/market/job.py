"""The training job of the market: the same state, data and steps under every launcher.

Under ``elastic-ckpt run`` it uses a Session; with ``--plain DIR`` it does what a careful author
does without one: rank 0 saves, under a name of its own and moved into place, all ranks load the
newest file, and after SIGTERM all save at the same step and leave.

What was trained on is part of the state: how often each sample was used, how many steps were made,
and slices of ballast, of which each step changes one. So the state itself says in the end whether
it lost, repeated or skipped anything, whatever became of the processes. Each rank appends
``step time samples`` to ``--trace`` after each step: when, in the machine's monotonic seconds,
and how many samples its state has seen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

BATCH = 8
"""Samples of a rank and step."""
SAMPLES = 1_000_000
"""More than anybody trains on; in order, so that what was used must be a beginning of them."""
SLICE = 1_000_000
"""Numbers in one slice of the ballast, of 4 bytes each."""


class Numbers(Dataset[int]):
    """Sample i is i."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        return index


class Model(nn.Module):
    """A weight that is trained, and the account of the training."""

    def __init__(self, megabytes: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))
        self.register_buffer("used", torch.zeros(SAMPLES, dtype=torch.int8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        count = max(1, round(megabytes * 1e6 / 4 / SLICE))
        # Frozen parameters: equal on all ranks, and without gradients to send.
        self.slices = nn.ParameterList(
            nn.Parameter(torch.zeros(SLICE), requires_grad=False) for _ in range(count)
        )

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        return (self.weight * (samples[:, None] % 7 - 3.0) - 1.0).pow(2).mean()

    @torch.no_grad()
    def note(self, samples: torch.Tensor) -> None:
        """Count a step of all ranks."""
        self.used.index_add_(0, samples, torch.ones(len(samples), dtype=torch.int8))
        self.slices[int(self.steps) % len(self.slices)].add_(1.0)
        self.steps.add_(1)

    def taken(self) -> int:
        """Samples used."""
        return int(self.used.sum(dtype=torch.int64))

    def verdict(self) -> dict[str, Any]:
        """What the state says of itself."""
        last = int(self.used.nonzero().max()) + 1 if self.taken() else 0
        steps, count = int(self.steps), len(self.slices)
        expected = [steps // count + (number < steps % count) for number in range(count)]
        whole = [bool((one == n).all()) for one, n in zip(self.slices, expected, strict=True)]
        return {
            "steps": steps,
            "taken": self.taken(),
            "repeated": self.taken() - int((self.used > 0).sum()),
            "skipped": last - int((self.used > 0).sum()),
            "torn": not all(whole),
        }


class Job:
    """One process of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.bare = Model(args.size)
        # Left out for everybody: the broadcast that a fast network makes in no time.
        self.model = nn.parallel.DistributedDataParallel(
            self.bare, broadcast_buffers=False, init_sync=False
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.trace = open(f"{args.trace}.{dist.get_rank()}", "a", buffering=1)  # noqa: SIM115
        self.told = False
        """Whether this process got SIGTERM."""

    def step(self, samples: torch.Tensor) -> tuple[bool, bool]:
        """Train, and return whether any rank was told to leave, and whether the market closed."""
        began = time.monotonic()
        self.model(samples.float()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        time.sleep(max(0.0, self.args.pause - (time.monotonic() - began)))
        flags = [int(self.told), int(os.path.exists(self.args.end))]
        mine = torch.cat([samples, torch.tensor(flags)])
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(found, mine)
        together = torch.stack(found)
        self.bare.note(together[:, :-2].flatten())
        told, closed = together[:, -2].any(), together[:, -1].all()
        return bool(told), bool(closed)

    def tell(self) -> None:
        """A line for the trace."""
        self.trace.write(f"{int(self.bare.steps)} {time.monotonic()} {self.bare.taken()}\n")

    def close(self) -> None:
        """The market is closed: write what the state says."""
        new = Path(self.args.result + ".new")
        new.write_text(json.dumps(self.bare.verdict()))
        new.replace(self.args.result)

    def with_session(self) -> None:
        """Under ``elastic-ckpt run``."""
        from elastic_ckpt import ElasticSampler, Session

        sampler = ElasticSampler(Numbers(), shuffle=False)
        loader = DataLoader(Numbers(), BATCH, sampler=sampler)
        with Session(model=self.model, optimizer=self.optimizer) as session:
            for _ in session.epochs(1):
                for samples in session.batches(loader):
                    _, closed = self.step(samples)
                    self.tell()
                    if closed:
                        self._end()
                        return

    def alone(self, directory: Path) -> None:
        """With the script's own saves."""
        if self.args.on_term:
            signal.signal(signal.SIGTERM, self._note_term)
        directory.mkdir(exist_ok=True)
        self.load(directory)
        loader = DataLoader(Numbers(), BATCH, sampler=Rest(self.bare.taken()))
        saved = time.monotonic()
        for samples in loader:
            told, closed = self.step(samples)
            self.tell()
            if closed:
                self._end()
                return
            due = torch.tensor(time.monotonic() - saved >= self.args.every)
            dist.broadcast(due, 0)
            if told or due:
                self.save(directory)
                saved = time.monotonic()
            if self.told:
                raise SystemExit(0)

    def save(self, directory: Path) -> None:
        """Rank 0 writes, and the others wait for it."""
        if dist.get_rank() == 0:
            state = {"model": self.bare.state_dict(), "optimizer": self.optimizer.state_dict()}
            self.write(directory, state)
        dist.barrier()

    def write(self, directory: Path, state: dict[str, Any]) -> None:
        """Write a file, synced, and moved into place; the newest two stay."""
        path = directory / f"step-{int(self.bare.steps):09}.pt"
        with open(f"{path}.new", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)
        for old in saved(directory)[:-2]:
            with contextlib.suppress(OSError):
                old.unlink()

    def load(self, directory: Path) -> None:
        """The newest one that rank 0 sees."""
        newest: list[Any] = [saved(directory)[-1:]]
        dist.broadcast_object_list(newest, 0)
        for path in newest[0]:
            found = torch.load(path, weights_only=True, mmap=True)
            self.bare.load_state_dict(found["model"])
            self.optimizer.load_state_dict(found["optimizer"])

    def _end(self) -> None:
        if dist.get_rank() == 0:
            self.close()

    def _note_term(self, *_: object) -> None:
        self.told = True


class Rest(Sampler[int]):
    """A rank's share of the samples that the job has not come to."""

    def __init__(self, taken: int) -> None:
        self._first = taken + dist.get_rank()

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._first, SAMPLES, dist.get_world_size()))


def saved(directory: Path) -> list[Path]:
    """The script's own files, the newest last."""
    return sorted(directory.glob("step-*.pt"))


def arguments() -> argparse.ArgumentParser:
    """What the job's scripts are told."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", required=True, help="its rank is appended")
    parser.add_argument("--end", required=True, help="train until this file is there")
    parser.add_argument("--result", required=True, help="where the state's verdict is written")
    parser.add_argument("--size", type=float, default=100.0, help="MB of state")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds of a step")
    parser.add_argument("--plain", type=Path, help="save and load there, without elastic-ckpt")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between own saves")
    parser.add_argument("--on-term", action="store_true", help="save on SIGTERM as well")
    return parser


def main() -> None:
    """Train until the market closes."""
    args = arguments().parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    job = Job(args)
    if args.plain:
        job.alone(args.plain)
    else:
        job.with_session()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
