"""A job with checkpoints of a given size, number and loss, without randomness.

Reports ``loss``, which is lowest at step --best. ``--hold STEP:FILE`` waits before a step, bounded,
until a file is there; may be repeated.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Retention, Session


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--interval", type=int, default=2)
    parser.add_argument("--best", type=int, default=6)
    parser.add_argument("--kilobytes", type=int, default=1)
    parser.add_argument("--keep-last", type=int, default=0)
    parser.add_argument("--hold", action="append", default=[])
    args = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = nn.Linear(250, args.kilobytes, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.ones(args.steps * ranks, 250))
    loader = DataLoader(data, sampler=ElasticSampler(data, seed=1))
    holds = {int(step): file for step, _, file in (hold.partition(":") for hold in args.hold)}
    retention = Retention(last=args.keep_last) if args.keep_last else None
    with Session(
        model=model, optimizer=optimizer, save_interval=args.interval, retention=retention
    ) as session:
        for _ in session.epochs(1):
            for (batch,) in session.batches(loader):
                step = session.step + 1
                limit = time.monotonic() + 60
                while step in holds and not os.path.exists(holds[step]):
                    if time.monotonic() > limit:
                        raise TimeoutError(holds[step])
                    time.sleep(0.01)
                model(batch).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                session.report(loss=abs(step - args.best))
        print(f"resumed from {session.resumed_from}", flush=True)


if __name__ == "__main__":
    main()
