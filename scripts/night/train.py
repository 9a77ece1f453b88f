"""The training script of the night: a small regression with steps of about 30 ms.

A file in --trouble makes one rank misbehave once: nan, raise, hang.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Session


def main() -> None:
    """Train to the end, or until something is to fail."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--pause", type=float, default=0.03)
    parser.add_argument("--trouble", type=Path, required=True)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    inputs = torch.randn(960, 64)
    targets = torch.sin(inputs.sum(dim=1, keepdim=True)) + 0.1 * torch.randn(960, 1)
    dataset = TensorDataset(inputs, targets)
    loader = DataLoader(dataset, batch_size=8, sampler=ElasticSampler(dataset, seed=0))
    layers = [nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1)]
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    with Session(os.environ["ELASTIC_CKPT_DIR"], model=model, optimizer=optimizer) as session:
        for _ in session.epochs(args.epochs):
            for batch, target in session.batches(loader):
                loss = nn.functional.mse_loss(model(batch), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                time.sleep(args.pause)
                misbehave(args.trouble, session, loss.item())


def misbehave(trouble: Path, session: Session, loss: float) -> None:
    """Report the loss, or fail as a file in ``trouble`` requests."""
    mine = dist.get_rank() == 1
    if mine and taken(trouble / "raise"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if mine and taken(trouble / "hang"):
        time.sleep(600)
    session.report(loss=float("nan") if mine and taken(trouble / "nan") else loss)


def taken(path: Path) -> bool:
    """Remove a file; return whether it existed."""
    if path.exists():
        path.unlink()
        return True
    return False


if __name__ == "__main__":
    main()
