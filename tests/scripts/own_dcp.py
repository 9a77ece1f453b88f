"""Two ranks that save with torch.distributed.checkpoint, every second time asynchronously."""

import argparse
import os
import signal
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

parser = argparse.ArgumentParser()
parser.add_argument("--resume", default="")
parser.add_argument("--steps", type=int, default=24)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--tear_at", type=int, default=0, help="rank 1 dies in this save, once")
args = parser.parse_args()

dist.init_process_group("gloo")
rank, background = dist.get_rank(), dist.new_group(backend="gloo")
torch.manual_seed(rank)
state = {
    "step": torch.zeros((), dtype=torch.int64),
    "shared": torch.ones(64),
    f"own.{rank}": torch.randn(2048),
}
if args.resume:
    dcp.load(state, checkpoint_id=args.resume)
    if rank == 0:
        print(f"resumed at {int(state['step'])}", flush=True)
asked, pending = [], None
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
while int(state["step"]) < args.steps:
    state["step"] += 1
    state[f"own.{rank}"].mul_(1.01).add_(float(state["step"]))
    dist.all_reduce(state["shared"])
    state["shared"].div_(dist.get_world_size()).add_(0.5)
    time.sleep(args.pause)
    step = int(state["step"])
    stops = torch.tensor(len(asked))
    dist.all_reduce(stops)
    if step % 4 == 0 or stops:
        if pending is not None:
            pending.result()
        if step == args.tear_at and rank == 1 and not os.path.exists("torn"):
            open("torn", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if step % 8 == 0:
            place = f"out/step-{step}"
            pending = dcp.async_save(state, checkpoint_id=place, process_group=background)
        else:
            pending = dcp.save(state, checkpoint_id=f"out/step-{step}") and None
    if stops:
        if pending is not None:
            pending.result()
        raise SystemExit(0)
if pending is not None:
    pending.result()
torch.save(state, f"final.{rank}.pt")
dist.destroy_process_group()
