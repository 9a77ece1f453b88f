"""A tiny model in a Fabric loop that survives a preemption: docs/lightning.md.

elastic-ckpt run --dir run1 --nproc 2 examples/fabric_loop.py
"""

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler
from elastic_ckpt.integrations.fabric import Session

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--every", type=int, help="optimizer steps between saves")
parser.add_argument("--pause", type=float, default=0.0, help="seconds per batch")
parser.add_argument("--trace", type=Path, help="write the samples of each rank here")
options = parser.parse_args()

ranks = int(os.environ.get("WORLD_SIZE", "1"))
fabric = Fabric(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto")
fabric.launch()
fabric.seed_everything(1, verbose=False)
inputs = torch.randn(190, 9)
data = TensorDataset(torch.arange(190), inputs, inputs.sum(1, keepdim=True))
model = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))
model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.02))
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, 200)
loader = DataLoader(data, batch_size=4, sampler=ElasticSampler(data, seed=1))

with Session(
    fabric=fabric, model=model, optimizer=optimizer, lr_scheduler=schedule, accumulation_steps=3,
    save_interval=options.every,
) as session:  # fmt: skip
    for epoch in session.epochs(options.epochs):
        for numbers, features, targets in session.batches(loader):
            with fabric.no_backward_sync(model, enabled=not session.step_ends):
                loss = (model(features) - targets).square().mean()
                fabric.backward(loss / session.accumulation_steps)
            if session.step_ends:
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if options.trace is not None:
                with open(f"{options.trace}.{fabric.global_rank}", "a") as file:
                    print(json.dumps([session.step, epoch, numbers.tolist()]), file=file)
            time.sleep(options.pause)

digest = hashlib.sha256()
for value in model.state_dict().values():
    digest.update(value.cpu().numpy().tobytes())
print(f"rank {fabric.global_rank} finished: step {session.step}, weights {digest.hexdigest()}")
