"""Training loops as ColossalChat's applications have them, with what those get wrong, and as ours.

``SeedLoop`` does what the applications of ColossalAI 0.5.0 do, written anew from their behaviour;
``OurLoop`` is the same loop with elastic-ckpt's names. Both count what they use. A process that is
taken away is a loop that stops.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

SAMPLES = 24
BATCH = 2


class SeedSampler(DistributedSampler):
    """Leaves out what was used, in every epoch from then on."""

    start_index = 0

    def __iter__(self):
        return iter(list(super().__iter__())[self.start_index :])

    def __len__(self):
        return super().__len__() - self.start_index

    def set_start_index(self, start_index):
        self.start_index = start_index


@dataclass
class Used:
    """What one process did: (epoch, sample) in order, and what each step drew at random."""

    samples: list[tuple[int, int]] = field(default_factory=list)
    first_step: int = 0
    steps_saved: list[int] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)

    def in_epoch(self, epoch: int) -> list[int]:
        """Return the samples of an epoch, in order."""
        return [sample for at, sample in self.samples if at == epoch]


def build() -> tuple[Any, ...]:
    """Return booster, model, optimizer and scheduler, as every application makes them."""
    from colossalai.booster import Booster
    from colossalai.booster.plugin import TorchDDPPlugin

    from elastic_ckpt.training.engines.colossalai.cpu_shim import patch_loads

    patch_loads()
    torch.manual_seed(5)
    booster = Booster(plugin=TorchDDPPlugin())
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    model, optimizer, _, _, scheduler = booster.boost(model, optimizer, lr_scheduler=scheduler)
    return booster, model, optimizer, scheduler


class SeedLoop:
    """Saves at the end of an epoch, one step further than it is, and every ``every`` steps."""

    sampler_class: Any = SeedSampler

    def __init__(self, directory: str, every: int = 0) -> None:
        self.directory, self.every = directory, every
        self.state = build()
        self.used = Used()
        self.sampler = self.sampler_class(
            list(range(SAMPLES)), dist.get_world_size(), dist.get_rank(), seed=3
        )
        self.loader = DataLoader(list(range(SAMPLES)), BATCH, sampler=self.sampler)

    def run(self, epochs: int, stop_after: int = 10**6) -> Used:
        """Train; end without notice after a number of steps."""
        first_epoch, steps = self.resume()
        for epoch in range(first_epoch, epochs):
            for batch in self.loader:
                self.train(epoch, batch)
                steps += 1
                self.after_step(epoch, steps)
                stop_after -= 1
                if not stop_after:
                    return self.used
            self.after_epoch(epoch, steps)
        return self.used

    def train(self, epoch: int, batch: torch.Tensor) -> None:
        """Train one step."""
        booster, model, optimizer, scheduler = self.state
        booster.backward(model(torch.ones(BATCH, 3)).mean() * torch.rand(()), optimizer)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        self.used.samples += [(epoch, int(sample)) for sample in batch]
        self.used.draws.append(torch.rand(()).item())

    def resume(self) -> tuple[int, int]:
        """Load the newest directory; the step counter restarts at 0."""
        found = sorted(path.name for path in Path(self.directory).glob("epoch-*"))
        if not found:
            return 0, 0
        place = os.path.join(self.directory, found[-1])
        booster, model, optimizer, scheduler = self.state
        booster.load_model(model, os.path.join(place, "modeling"))
        booster.load_optimizer(optimizer, os.path.join(place, "optimizer"))
        booster.load_lr_scheduler(scheduler, os.path.join(place, "lr_scheduler"))
        with open(os.path.join(place, "running_states.json")) as file:
            running = json.load(file)
        self.sampler.set_start_index(running["sample_start_index"])
        return running["epoch"], 0

    def after_step(self, epoch: int, steps: int) -> None:
        """Save within an epoch, as some of the applications do."""
        if self.every and steps % self.every == 0:
            self.save(epoch, steps + 1)

    def after_epoch(self, epoch: int, steps: int) -> None:
        """Save at the end of an epoch, as all of them do."""
        self.save(epoch, steps + 1)

    def save(self, epoch: int, step: int) -> None:
        """Write file after file, without waiting for the other ranks."""
        booster, model, optimizer, scheduler = self.state
        place = os.path.join(self.directory, f"epoch-{epoch}_step-{step}")
        os.makedirs(os.path.join(place, "modeling"), exist_ok=True)
        booster.save_model(model, os.path.join(place, "modeling"), shard=True)
        booster.save_optimizer(optimizer, os.path.join(place, "optimizer"), shard=True)
        booster.save_lr_scheduler(scheduler, os.path.join(place, "lr_scheduler"))
        running = {"epoch": epoch, "step": step, "sample_start_index": step * BATCH}
        if dist.get_rank() == 0:
            with open(os.path.join(place, "running_states.json"), "w") as file:
                json.dump(running, file)
        self.used.steps_saved.append(step)


class OurLoop(SeedLoop):
    """The same with elastic-ckpt's functions and sampler; also saves on request."""

    def __init__(self, directory: str, every: int = 0, notice_at: int = 0) -> None:
        from elastic_ckpt import StatefulDistributedSampler

        self.sampler_class = StatefulDistributedSampler
        self.notice_at = notice_at
        super().__init__(directory, every)

    def resume(self) -> tuple[int, int]:
        """Load the newest intact checkpoint."""
        from elastic_ckpt import load_checkpoint

        Path(self.directory).mkdir(exist_ok=True)  # a missing one is taken for a mistake
        epoch, step, index = load_checkpoint(self.directory, *self.state)
        self.sampler.set_start_index(index)
        self.used.first_step = step
        return epoch, step

    def after_step(self, epoch: int, steps: int) -> None:
        """Run the line added to a loop, then ``save_checkpoint`` as before."""
        import signal

        from elastic_ckpt import should_save

        if steps == self.notice_at:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # a step as long as those of a large model
        if should_save(steps, every=self.every):
            self.save(epoch, steps)

    def after_epoch(self, epoch: int, steps: int) -> None:
        """Save as the applications do."""
        self.save(epoch, steps)

    def save(self, epoch: int, step: int) -> None:
        """Return after the seal."""
        from elastic_ckpt import save_checkpoint

        self.used.steps_saved.append(step)
        save_checkpoint(self.directory, *self.state, epoch, step, BATCH, None)
