"""Plain torch, no ColossalAI: a DistributedDataParallel model that survives its machine.

elastic-ckpt run --dir ckpt --nproc 2 -- examples/torch_ddp.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()

    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    inputs = torch.randn(1024, 16)
    dataset = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
    loader = DataLoader(dataset, batch_size=16, sampler=ElasticSampler(dataset, seed=0))
    model: nn.Module = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    if distributed:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    save_dir = os.environ.get("ELASTIC_CKPT_DIR", "checkpoints")
    with Session(save_dir, model=model, optimizer=optimizer, save_interval=50) as session:
        for _ in session.epochs(args.epochs):
            for batch, target in session.batches(loader):
                loss = nn.functional.mse_loss(model(batch), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                session.report(loss=loss.item())  # for the report, and for --keep-best
    if session.resumed_from:
        print(f"resumed from {session.resumed_from.name}")
    print(f"step {session.step}")


if __name__ == "__main__":
    main()
