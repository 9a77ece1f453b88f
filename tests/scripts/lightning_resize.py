"""A fit on Lightning whose epochs are read by any number of processes.

usage: lightning_resize.py TRACE ORDER WORKERS PAUSE: ORDER is elastic, shuffled or sequential.
"""

import json
import os
import sys
import time
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler
from elastic_ckpt.integrations.lightning import ElasticCallback

SAMPLES, EPOCHS, SEED = 180, 2, 3


class Model(L.LightningModule):
    def __init__(self, trace: str, order: str, workers: int, pause: float) -> None:
        super().__init__()
        self.trace, self.order, self.workers, self.pause = trace, order, workers, pause
        self.layer = torch.nn.Linear(1, 1)

    def train_dataloader(self) -> DataLoader:
        data = TensorDataset(torch.arange(SAMPLES))
        options: dict[str, Any] = {"shuffle": self.order == "shuffled"}
        if self.order == "elastic":
            options = {"sampler": ElasticSampler(data, seed=SEED)}
        return DataLoader(data, batch_size=4, num_workers=self.workers, **options)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        with open(f"{self.trace}.{self.global_rank}", "a", encoding="utf-8") as file:
            print(json.dumps([self.current_epoch, index, batch[0].tolist()]), file=file)
        time.sleep(0.0 if self.current_epoch else self.pause)
        return self.layer(batch[0].float().unsqueeze(1) / SAMPLES).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def main(trace: str, order: str, workers: str, pause: str) -> None:
    L.seed_everything(1, verbose=False)
    ranks = int(os.environ["WORLD_SIZE"])
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto",
        use_distributed_sampler=order != "elastic", max_epochs=EPOCHS,
        callbacks=[ElasticCallback()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    model = Model(trace, order, int(workers), float(pause))
    trainer.fit(model, ckpt_path=ElasticCallback.newest())


if __name__ == "__main__":
    main(*sys.argv[1:])
