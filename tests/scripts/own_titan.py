"""A trainer's loop as torchtitan's, around its checkpoint manager, or the stand-in for it."""

import argparse
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torchtitan.components.checkpoint import CheckpointManager

from elastic_ckpt.integrations.torchtitan import elastic

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--interval", type=int, default=8)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--async_mode", default="disabled")
parser.add_argument("--plain", action="store_true")
parser.add_argument("--twice", action="store_true")
args = parser.parse_args()


class Optimizers:
    def __init__(self, model):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def state_dict(self):
        return get_optimizer_state_dict(self.model, self.optimizer)

    def load_state_dict(self, state):
        set_optimizer_state_dict(self.model, self.optimizer, state)


class Loader:
    """Yields samples of a position that it saves."""

    position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]

    def next(self):
        self.position += 1
        seed = self.position * dist.get_world_size() + dist.get_rank()
        return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))


class Trainer:
    step = 0

    def __init__(self):
        dist.init_process_group("gloo")
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.optimizers, self.loader = Optimizers(self.model), Loader()
        config = CheckpointManager.Config(
            enable=True, folder="checkpoint", interval=args.interval,
            last_save_model_only=False, async_mode=args.async_mode,
        )  # fmt: skip
        if not args.plain:
            config = elastic(config)
        if args.twice:
            config = elastic(config)
        self.checkpointer = config.build(
            dataloader=self.loader, model_parts=[self.model], optimizers=self.optimizers,
            lr_schedulers=nn.Module(), states={"train_state": self}, sd_adapter=None,
            base_folder="dump",
        )  # fmt: skip

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]

    def train(self):
        self.checkpointer.load(step=-1)
        if dist.get_rank() == 0:
            print(f"Training starts at step {self.step + 1}", flush=True)
        while self.step < args.steps:
            self.step += 1
            inputs = self.loader.next()
            loss = (self.model(inputs) - inputs.sum(1, keepdim=True)).pow(2).mean()
            self.optimizers.optimizer.zero_grad()
            loss.backward()
            for parameter in self.model.parameters():
                dist.all_reduce(parameter.grad)
            self.optimizers.optimizer.step()
            time.sleep(args.pause)
            self.checkpointer.save(self.step, last_step=self.step == args.steps)
            if dist.get_rank() == 0:
                print(f"done: {self.step}", flush=True)
        if dist.get_rank() == 0:
            torch.save(self.model.state_dict(), "final.pt")


trainer = Trainer()
trainer.train()
trainer.checkpointer.close()
dist.destroy_process_group()
