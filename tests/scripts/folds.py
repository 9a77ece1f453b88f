"""Three phases in one script, each with a Session: an unnamed one, fold0 and fold1.

Rank 0 writes "PHASE STEP" per step to --trace, and a digest of each model to --digest.
"""

import argparse
import hashlib
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Session

parser = argparse.ArgumentParser()
parser.add_argument("--trace", required=True)
parser.add_argument("--digest", required=True)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--names", default=",fold0,fold1")
args = parser.parse_args()
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    dist.init_process_group("gloo")
rank = dist.get_rank() if dist.is_initialized() else 0
torch.set_num_threads(1)
torch.manual_seed(1)
inputs = torch.randn(64, 4)
data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
digest = hashlib.sha256()
for number, name in enumerate(args.names.split(",")):
    torch.manual_seed(number)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = DataLoader(data, batch_size=4, sampler=ElasticSampler(data, seed=number))
    with Session(name=name, model=model, optimizer=optimizer, save_interval=3) as session:
        for _ in session.epochs(2 + number):
            for x, y in session.batches(loader):
                (model(x) - y).pow(2).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if rank == 0:
                    with open(args.trace, "a") as trace:
                        trace.write(f"{name or 'main'} {session.step + 1}\n")
                time.sleep(args.pause)
    for value in model.state_dict().values():
        digest.update(value.numpy().tobytes())
if rank == 0:
    with open(args.digest, "w") as file:
        file.write(digest.hexdigest())
