"""A tiny model in an Accelerate loop that survives a preemption: docs/accelerate.md.

elastic-ckpt run --dir run1 --nproc 2 examples/accelerate_loop.py
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt.integrations.accelerate import Session  # 1

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--every", type=int, help="optimizer steps between saves")
parser.add_argument("--pause", type=float, default=0.0, help="seconds per batch")
parser.add_argument("--accumulate", type=int, default=3)
parser.add_argument("--precision", default="bf16")
parser.add_argument("--trace", type=Path, help="write the samples of each rank here")
options = parser.parse_args()

accelerator = Accelerator(
    cpu=not torch.cuda.is_available(),
    gradient_accumulation_steps=options.accumulate,
    mixed_precision=options.precision,
)
set_seed(1)
inputs = torch.randn(190, 9)
data = TensorDataset(torch.arange(190), inputs, inputs.sum(1, keepdim=True))
model = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
loader = DataLoader(data, batch_size=4, shuffle=True)
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

with Session(  # 2
    accelerator=accelerator, model=model, optimizer=optimizer, lr_scheduler=schedule,
    save_interval=options.every,
) as session:  # fmt: skip
    for epoch in session.epochs(options.epochs):  # 3
        for numbers, features, targets in session.batches(loader):  # 4
            with accelerator.accumulate(model):
                loss = (model(features) - targets).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if options.trace is not None:
                with open(f"{options.trace}.{accelerator.process_index}", "a") as file:
                    print(json.dumps([session.step, epoch, numbers.tolist()]), file=file)
            time.sleep(options.pause)

digest = hashlib.sha256()
for value in accelerator.unwrap_model(model).state_dict().values():
    digest.update(value.cpu().numpy().tobytes())
print(
    f"rank {accelerator.process_index} finished: step {session.step}, weights {digest.hexdigest()}"
)
