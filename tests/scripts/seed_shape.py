"""A script of the seed's shape: its own loop, the two functions, and one added line.

--engine torch runs it without ColossalAI. --results notes (incarnation's first step, last step).
"""

import argparse
import hashlib
import json
import os
import time

import torch
import torch.distributed as dist
from torch import nn

from elastic_ckpt import load_checkpoint, save_checkpoint, should_save


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=["torch", "colossalai"], default="colossalai")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--pause", type=float, default=0.03)
    parser.add_argument("--results")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    booster = coordinator = None
    if args.engine == "colossalai":
        import colossalai
        from colossalai.booster import Booster
        from colossalai.booster.plugin import TorchDDPPlugin
        from colossalai.cluster import DistCoordinator

        colossalai.launch_from_torch(verbose=False)
        coordinator = DistCoordinator()
        booster = Booster(plugin=TorchDDPPlugin())
        model, optimizer, _, _, scheduler = booster.boost(model, optimizer, lr_scheduler=scheduler)
    else:
        dist.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(model)
    save_dir = os.environ["ELASTIC_CKPT_DIR"]
    _, start, _ = load_checkpoint(save_dir, booster, model, optimizer, scheduler)
    for step in range(start + 1, args.steps + 1):
        inputs = torch.full((4, 8), float(step % 7) + dist.get_rank())
        loss = model(inputs).pow(2).mean()
        if booster:
            booster.backward(loss, optimizer)
        else:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        time.sleep(args.pause)
        if should_save(step, every=args.every):
            save_checkpoint(save_dir, booster, model, optimizer, scheduler, 0, step, 4, coordinator)
    if args.results and dist.get_rank() == 0:
        state = model.unwrap().state_dict() if booster else model.module.state_dict()
        digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values()))
        with open(args.results, "a") as file:
            file.write(json.dumps([start, digest.hexdigest()]) + "\n")


if __name__ == "__main__":
    main()
