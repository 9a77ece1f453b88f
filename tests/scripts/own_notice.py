"""A loop with a loader and files of its own, which asks elastic-ckpt only when to save and leave.

usage: own_notice.py notice|should_save OUT
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import elastic_ckpt

asks, out = sys.argv[1], Path(sys.argv[2])
dist.init_process_group("gloo")
rank, step = dist.get_rank(), 0
torch.manual_seed(1)
model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = TensorDataset(torch.ones(40, 2))
loader = DataLoader(data, batch_size=2, sampler=DistributedSampler(data))
if (out / "ckpt.pt").exists():
    found = torch.load(out / "ckpt.pt", weights_only=True)
    model.load_state_dict(found["model"])
    step = found["step"]
while step < 200:
    for (inputs,) in loader:
        model(inputs).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        with open(out / f"trace.{rank}", "a") as trace:
            print(step, file=trace)
        time.sleep(0.05)
        if asks == "notice":
            leaves, saves = elastic_ckpt.notice(), False
        else:
            saves = elastic_ckpt.should_save(step, every=7)
            leaves = saves and elastic_ckpt.notice()
        if saves or leaves:
            if rank == 0:
                torch.save({"model": model.state_dict(), "step": step}, out / "ckpt.new")
                os.replace(out / "ckpt.new", out / "ckpt.pt")
            dist.barrier()
        if leaves:
            sys.exit(0)
print(f"rank {rank} trained to step {step}")
