"""A job as steady.py, but sharded over its ranks, with a table that no rank has in full.

The table takes no part in the steps, so that these are quick; it is checked after each resume.
"""

import argparse
import json
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader

from elastic_ckpt import ElasticSampler, Session
from tests.scripts.steady import Points, pause

ROW = 1024


class Net(nn.Module):
    """What is trained, and the table."""

    def __init__(self, table):
        super().__init__()
        self.trained = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, inputs):
        return self.trained(inputs)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--size", type=int, default=480)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--calm", default="")
    parser.add_argument("--trace", required=True)
    parser.add_argument("--megabytes", type=int, default=128)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    incarnation = int(os.environ.get("TORCHELASTIC_RUN_ID", "job.0").rpartition(".")[2])
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(7)
    whole = torch.rand(args.megabytes * 1_000_000 // 4 // ROW, ROW, generator=generator)
    torch.manual_seed(1)
    model = Net(distribute_tensor(torch.zeros_like(whole), mesh, [Shard(0)]))
    fully_shard(model.trained, mesh=mesh)
    optimizer = torch.optim.AdamW(model.trained.parameters(), lr=1e-2)
    dataset = Points(args.size)
    loader = DataLoader(dataset, batch_size=2, sampler=ElasticSampler(dataset, seed=5))
    mine = distribute_tensor(whole, mesh, [Shard(0)]).to_local()
    with (
        open(f"{args.trace}.{dist.get_rank()}", "a", buffering=1) as trace,
        Session(model=model, optimizer=optimizer) as session,
    ):
        if session.step:
            assert torch.equal(model.table.to_local(), mine), "the table is not what was saved"
        else:
            model.table.to_local().copy_(mine)
        for epoch in session.epochs(args.epochs):
            for index, inputs, targets in session.batches(loader):
                loss = (model(inputs).squeeze(1) - targets).pow(2).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                line = [session.step + 1, epoch, index.tolist(), loss.item(), incarnation]
                trace.write(json.dumps(line) + "\n")
                pause(args, last=epoch == args.epochs - 1)


if __name__ == "__main__":
    main()
