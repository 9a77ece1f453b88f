"""A job that fails in a given step, in a given way, a given number of times."""

import argparse
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Session


def fail(how, session):
    if how == "raise":
        raise ValueError("the data of this step")
    if how == "nan":
        session.report(loss=float("nan"))
    if how == "hang":
        time.sleep(600)
    if how == "pause":
        time.sleep(3)
        return
    if how == "memory":
        hungry = []
        while True:
            hungry.append(bytearray(os.urandom(4096)) * 16384)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "fault": signal.SIGSEGV}[how])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--how", required=True)
    parser.add_argument("--times", type=int, default=99)
    parser.add_argument("--count", type=Path, required=True, help="grows by a byte each time")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--say", help="printed to standard output before it")
    parser.add_argument("--pace", type=float, default=0.0)
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = nn.Linear(1, 1)
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.ones(40, 1))
    loader = DataLoader(data, sampler=ElasticSampler(data, seed=1))
    args.count.touch()
    with Session(model=model, optimizer=optimizer, save_interval=2) as session:
        for _ in session.epochs(1):
            for (batch,) in session.batches(loader):
                due = session.step + 1 == args.step and rank == args.rank
                if due and args.count.stat().st_size < args.times:
                    with args.count.open("ab") as count:
                        count.write(b"x")
                    if args.say:
                        print(args.say)
                    fail(args.how, session)
                model(batch).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                time.sleep(args.pace)


if __name__ == "__main__":
    main()
