"""A tiny model on PyTorch Lightning that survives a preemption: docs/lightning.md.

elastic-ckpt run --dir run1 --nproc 2 examples/lightning_fit.py
"""

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt.integrations.lightning import ElasticCallback

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--every", type=int, default=5, help="optimizer steps between saves")
parser.add_argument("--pause", type=float, default=0.0, help="seconds per batch")
parser.add_argument("--accumulate", type=int, default=2)
parser.add_argument("--trace", type=Path, help="write the samples of each rank here")
options = parser.parse_args()
ranks = int(os.environ.get("WORLD_SIZE", "1"))


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        numbers, inputs = batch
        if options.trace is not None:
            with open(f"{options.trace}.{self.global_rank}", "a", encoding="utf-8") as file:
                print(json.dumps([self.current_epoch, index, numbers.tolist()]), file=file)
        time.sleep(options.pause)
        return (self.layers(inputs) - inputs.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


L.seed_everything(1, verbose=False)
data = TensorDataset(torch.arange(180), torch.randn(180, 9))
loader = DataLoader(data, batch_size=4, shuffle=True)
model = Model()
trainer = L.Trainer(
    accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto",
    max_epochs=options.epochs, accumulate_grad_batches=options.accumulate,
    callbacks=[ElasticCallback(every_n_steps=options.every)],
    logger=False, enable_checkpointing=False, enable_progress_bar=False,
)  # fmt: skip
trainer.fit(model, loader, ckpt_path=ElasticCallback.newest())

digest = hashlib.sha256()
for value in model.state_dict().values():
    digest.update(value.numpy().tobytes())
print(
    f"rank {trainer.global_rank} finished: step {trainer.global_step}, weights {digest.hexdigest()}"
)
