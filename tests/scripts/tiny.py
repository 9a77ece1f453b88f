"""A small job with everything that makes exactness hard: dropout, shuffling, accumulation,
DataLoader workers, an evaluation, a scheduler per epoch.

Prints nothing; writes the samples that each step used to --trace, one line per rank and step,
and a digest of the final parameters to --digest.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from elastic_ckpt import ElasticSampler, Session


class Numbers(Dataset):
    def __init__(self, size):
        generator = torch.Generator().manual_seed(11)
        self.inputs = torch.randn(size, 8, generator=generator)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return index, self.inputs[index]


def give_notice(args, step, place, rank):
    """Signal the supervisor from here, as if a preemption came at this very moment."""
    if not args.notice or os.path.exists(args.notice_file):
        return
    at_step, at_place, *at_rank = args.notice.split(":")
    if (step, place) == (int(at_step), at_place) and rank == int((at_rank or [0])[0]):
        open(args.notice_file, "w").close()
        supervisor = next(p for p in psutil.Process().parents() if "run" in p.cmdline())
        supervisor.send_signal(signal.SIGTERM)


def leave_with_0(path, step, rank, *, within=False):
    """Leave as the file says, STEP RANK HOW: one rank within a step, and once; -1 for all after
    STEP."""
    if not path or not os.path.exists(path):
        return
    try:
        at_step, who, how = Path(path).read_text().split()
    except FileNotFoundError:  # the other rank has left
        return
    if within and int(who) == rank:
        Path(path).unlink()
    if int(who) == rank if within else int(who) < 0 and step == int(at_step):
        os._exit(0) if how == "os._exit" else sys.exit(0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--size", type=int, default=203)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--interval", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--calm", default="", help="a file: once it exists, without --pause")
    parser.add_argument("--slow-rank", type=int, default=-1)
    parser.add_argument("--slow-eval", type=float, default=0.0)
    parser.add_argument("--interruptible", action="store_true")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument(
        "--notice", help="STEP:PLACE[:RANK], places: step, eval; once, and only once"
    )
    parser.add_argument("--notice-file", help="stands where the notice was given")
    parser.add_argument("--leave", default="", help="a file: see leave_with_0")
    parser.add_argument("--chatty", default="", help="a file: while it exists, print much")
    parser.add_argument("--trace")
    parser.add_argument("--digest")
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(1)
    random.seed(2)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
    dataset = Numbers(args.size)
    loader = DataLoader(
        dataset,
        batch_size=args.batch,
        sampler=ElasticSampler(dataset, seed=args.seed),
        num_workers=args.workers,
    )
    trace = open(f"{args.trace}.{rank}", "a", buffering=1) if args.trace else None
    with Session(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        accumulation_steps=args.accumulation,
        save_interval=args.interval,
    ) as session:
        for epoch in session.epochs(args.epochs):
            used = []
            for index, inputs in session.batches(loader):
                used.extend(index.tolist())
                noise = random.random() * 1e-3
                loss = model(inputs).pow(2).mean() + noise * model(inputs).mean()
                (loss / args.accumulation).backward()
                if args.pause and args.slow_rank in (-1, rank) and not os.path.exists(args.calm):
                    time.sleep(args.pause)
                if args.chatty and os.path.exists(args.chatty):
                    print(f"step {session.step} " + "x" * 20000)
                leave_with_0(args.leave, session.step, rank, within=True)
                give_notice(args, session.step + 1, "step", rank)
                if session.step_ends:
                    optimizer.step()
                    optimizer.zero_grad()
                    if trace:
                        step = session.step + 1
                        trace.write(json.dumps([step, epoch, used, loss.item()]) + "\n")
                    used = []
                    leave_with_0(args.leave, session.step + 1, rank)
            with session.evaluation(interruptible=args.interruptible) as evaluation:
                give_notice(args, session.step, "eval", rank)
                for _ in evaluation.batches(range(10)):
                    torch.rand(3)
                    random.random()
                    time.sleep(args.slow_eval / 10)
            scheduler.step()
    if args.digest and rank == 0:
        digest = hashlib.sha256()
        for _, value in sorted(model.state_dict().items()):
            digest.update(value.numpy().tobytes())
        digest.update(repr(scheduler.get_last_lr()).encode())
        with open(args.digest, "w") as file:
            file.write(digest.hexdigest())


if __name__ == "__main__":
    main()
