"""A job that reports its loss and trains until a test's file is there."""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Session


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--enough", type=Path, required=True, help="a file: leave once it is there")
    parser.add_argument("--pause", type=float, default=0.01)
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(1)
    inputs = torch.randn(64, 8)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    loader = DataLoader(data, batch_size=4, sampler=ElasticSampler(data, seed=1))
    model = nn.Linear(8, 1)
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Session(model=model, optimizer=optimizer, save_interval=20) as session:
        print("begins", flush=True)
        for _ in session.epochs(100_000):
            if args.enough.exists():
                break
            for batch, target in session.batches(loader):
                loss = nn.functional.mse_loss(model(batch), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                session.report(loss=loss.item())
                time.sleep(args.pause)


if __name__ == "__main__":
    main()
