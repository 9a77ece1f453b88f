"""A stream read by torchdata's workers, of which one ends long before the other.

usage: streaming.py TRACE: a line per batch, with its epoch.
"""

import json
import sys
import time
from collections.abc import Iterator

import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from elastic_ckpt import Session

SAMPLES = 120


class Shards(IterableDataset):
    """A third of the samples is the second worker's. A pass begins at its first sample unless a
    state was loaded, so that a worker which has ended stays there."""

    at, is_placed = 0, False

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        first, last = ((0, 80), (80, SAMPLES))[info.id]
        self.at, self.is_placed = self.at if self.is_placed else 0, False
        while first + self.at < last:
            self.at += 1
            yield first + self.at - 1

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at, self.is_placed = state["at"], True


def main(trace: str) -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = StatefulDataLoader(Shards(), batch_size=4, num_workers=2)
    with Session(model=model, optimizer=optimizer) as session:
        for epoch in session.epochs(2):
            for batch in session.batches(loader):
                with open(trace, "a", encoding="utf-8") as file:
                    print(json.dumps([epoch, batch.tolist()]), file=file)
                model(batch.float().unsqueeze(1) / SAMPLES).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
