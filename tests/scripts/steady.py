"""A job whose steps depend on the samples alone: no dropout, double precision.

Each rank writes a line per optimizer step to --trace.RANK: step, epoch, the samples that it used,
the sum of their losses, and the incarnation.
"""

import argparse
import json
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from elastic_ckpt import ElasticSampler, Session


class Points(Dataset):
    """A noisy line in eight dimensions."""

    def __init__(self, size):
        generator = torch.Generator().manual_seed(3)
        self.inputs = torch.randn(size, 8, generator=generator, dtype=torch.float64)
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        self.targets = self.inputs.sum(1) + 0.1 * noise

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return index, self.inputs[index], self.targets[index]


def pause(args, last):
    """Pause after a step. Until --calm exists the last epoch crawls: a test must be able to act
    before the job is over, on however busy a machine."""
    ends = time.monotonic() + args.pause * (20 if args.calm and last else 1)
    while time.monotonic() < ends and not os.path.exists(args.calm):
        time.sleep(min(0.05, args.pause))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--size", type=int, default=480)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--calm", default="", help="a file: once it is there, without --pause")
    parser.add_argument("--slow", type=float, default=0.0, help="seconds more of rank 1's work")
    parser.add_argument("--drop-last", action="store_true")
    parser.add_argument("--trace", required=True)
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    incarnation = int(os.environ.get("TORCHELASTIC_RUN_ID", "job.0").rpartition(".")[2])
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
    dataset = Points(args.size)
    sampler = ElasticSampler(dataset, seed=5, drop_last=args.drop_last)
    loader = DataLoader(dataset, batch_size=args.batch, sampler=sampler, num_workers=args.workers)
    with (
        open(f"{args.trace}.{rank}", "a", buffering=1) as trace,
        Session(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            accumulation_steps=args.accumulation,
        ) as session,
    ):
        session.state["starts"] = session.state.get("starts", 0) + 1
        for epoch in session.epochs(args.epochs):
            used, total = [], 0.0
            for index, inputs, targets in session.batches(loader):
                time.sleep(args.slow if rank == 1 else 0.0)
                losses = (model(inputs).squeeze(1) - targets).pow(2)
                (losses.mean() / session.accumulation_steps).backward()
                used += index.tolist()
                total += losses.sum().item()
                if session.step_ends:
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()
                    line = [session.step + 1, epoch, used, total, incarnation]
                    trace.write(json.dumps(line) + "\n")
                    used, total = [], 0.0
                    pause(args, last=epoch == args.epochs - 1)


if __name__ == "__main__":
    main()
