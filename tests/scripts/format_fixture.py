"""Makes ``tests/fixtures/format-<n>``: ``python -m tests.scripts.format_fixture DIRECTORY``.

``format-1`` has 12 samples, ``order-1`` and later ones 5,000, whose order differs by its version.
Run it when the format rises, never to make an old fixture fit a new writer.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Session


class Note:
    """An object with state that JSON cannot represent."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"words": ("a", b"b", 0.1)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def main(job: Path) -> None:
    torch.manual_seed(3)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    data = TensorDataset(torch.arange(5000.0).view(5000, 1))
    loader = DataLoader(data, batch_size=2, sampler=ElasticSampler(data, seed=3))
    extra = {"note": Note()}
    with Session(
        job, model=model, optimizer=optimizer, lr_scheduler=scheduler, save_interval=4, extra=extra
    ) as session:
        for _epoch in session.epochs(1):
            for (values,) in session.batches(loader):
                loss = model(values).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                session.report(loss=loss.item())
                if session.step == 5:
                    return


if __name__ == "__main__":
    place = Path(sys.argv[1])
    main(place / "fixture")
    shutil.move(place / "fixture" / "epoch-0_step-4", place / "epoch-0_step-4")
    shutil.rmtree(place / "fixture")
