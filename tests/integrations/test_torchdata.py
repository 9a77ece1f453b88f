"""torchdata's StatefulDataLoader in a Session: the batch that was consumed, to the bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elastic_ckpt import Session
from tests.integration.ranks import run_ranks
from tests.integration.test_rank_local import bits
from tests.integration.test_stateful_loaders import DATA, Numbers
from tests.job import SCRIPTS, Job
from tests.marks import slow
from tests.waiting import until

stateful: Any = pytest.importorskip("torchdata.stateful_dataloader")


class Placed(Numbers):
    """A stream that knows its place."""

    at = 0

    def __iter__(self) -> Any:
        while self.at < self.length:
            self.at += 1
            yield DATA[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def train(rank: int, directory: str, workers: int, stream: bool, stop: int) -> dict[str, Any]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data: Any = Placed() if stream else DATA
    loader = stateful.StatefulDataLoader(
        data, batch_size=4, num_workers=workers, shuffle=None if stream else True
    )
    seen: list[Any] = []
    session = Session(directory, model=model, optimizer=optimizer, save_interval=2)
    try:
        with session as run:
            for _ in run.epochs(3):
                for inputs, numbers in run.batches(loader):
                    seen.append(numbers.tolist())
                    model(inputs).pow(2).mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if len(seen) == stop:
                        raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    first = session.resumed_from.name if session.resumed_from else ""
    return {"seen": seen, "bits": bits(*model.parameters()), "from": first}


@pytest.mark.parametrize(("workers", "stream"), [(0, False), (2, False), (0, True), (2, True)])
def test_exact_in_and_between_epochs(tmp_path: Path, workers: int, stream: bool) -> None:
    [whole] = run_ranks(train, 1, str(tmp_path / "whole"), workers, stream, 0)
    for stop in (5, 8):
        run_ranks(train, 1, str(tmp_path / str(stop)), workers, stream, stop)
        [after] = run_ranks(train, 1, str(tmp_path / str(stop)), workers, stream, 0)
        assert isinstance(after, dict), after
        done = int(after["from"].rpartition("-")[2])
        assert done >= stop - 2
        assert after["seen"] == whole["seen"][done:]
        assert after["bits"] == whole["bits"]


@pytest.mark.parametrize("batches", [slow(9), slow(27)])
def test_a_stream_that_workers_read_resumes(batches: int, tmp_path: Path) -> None:
    """Under a supervisor, with both workers reading, and after one of them has ended."""
    trace = tmp_path / "trace"

    def seen() -> list[list[Any]]:
        return [json.loads(line) for line in trace.read_text().splitlines()]

    with Job(tmp_path, str(trace), nproc=1, script=SCRIPTS / "streaming.py") as job:
        job.start()
        until(lambda: trace.exists() and len(seen()) >= batches, seconds=90)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()
        assert batches <= len(seen()) < 30
        assert job.start().wait(60) == 0, job.output()
        for epoch in range(2):
            numbers = [number for there, batch in seen() if there == epoch for number in batch]
            assert sorted(numbers) == list(range(120))
