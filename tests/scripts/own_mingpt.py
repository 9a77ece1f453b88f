"""A DDP loop by epochs with one snapshot.pt, which rank 0 writes and every rank finds by itself."""

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


class Trainer:
    def __init__(self, model, optimizer, loader, args):
        self.rank = int(os.environ["RANK"])
        self.model, self.optimizer, self.loader, self.args = model, optimizer, loader, args
        self.epoch = 0
        if os.path.exists(args.snapshot_path):
            self.load()
        self.model = DistributedDataParallel(self.model)

    def load(self):
        found = torch.load(self.args.snapshot_path, weights_only=True)
        self.model.load_state_dict(found["model_state"])
        self.optimizer.load_state_dict(found["optimizer_state"])
        self.epoch = found["finished_epoch"]
        if self.rank == 0:
            print(f"resumed at epoch {self.epoch}", flush=True)

    def save(self):
        snapshot = {
            "model_state": self.model.module.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "finished_epoch": self.epoch,
        }
        torch.save(snapshot, self.args.snapshot_path)

    def train(self):
        while self.epoch < self.args.epochs:
            self.loader.sampler.set_epoch(self.epoch)
            for inputs, targets in self.loader:
                loss = nn.functional.mse_loss(self.model(inputs), targets)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                time.sleep(self.args.pause)
            self.epoch += 1
            if self.rank == 0:
                self.save()
        if self.rank == 0:
            torch.save(self.model.module.state_dict(), self.args.final)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--snapshot_path", default="snapshot.pt")
    parser.add_argument("--final", default="final.pt")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--pause", type=float, default=0.0)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(3)
    data = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data))
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    Trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-2), loader, args).train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
