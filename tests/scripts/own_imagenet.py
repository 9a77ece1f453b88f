"""An image classification loop: checkpoint.pth.tar after each epoch, model_best.pth.tar as a copy
of the best one, resumed with --resume PATH."""

import argparse
import os
import shutil
import time

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--resume", default="")
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--pause", type=float, default=0.0)
args = parser.parse_args()

torch.manual_seed(11)
model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
epoch, best = 0, -1.0
if args.resume:
    if not os.path.exists(args.resume):
        raise SystemExit(f"no checkpoint found at {args.resume}")
    found = torch.load(args.resume, weights_only=True)
    epoch, best = found["epoch"], found["best_acc1"]
    model.load_state_dict(found["state_dict"])
    optimizer.load_state_dict(found["optimizer"])
    scheduler.load_state_dict(found["scheduler"])
    print(f"resumed at epoch {epoch}", flush=True)
while epoch < args.epochs:
    generator = torch.Generator().manual_seed(epoch)
    right = 0
    for _ in range(4):
        images = torch.randn(8, 3, 2, 2, generator=generator)
        labels = torch.randint(5, (8,), generator=generator)
        output = model(images)
        right += int((output.argmax(1) == labels).sum())
        optimizer.zero_grad()
        nn.functional.cross_entropy(output, labels).backward()
        optimizer.step()
        time.sleep(args.pause)
    scheduler.step()
    epoch += 1
    is_best, best = right > best, max(float(right), best)
    torch.save(
        {
            "epoch": epoch,
            "best_acc1": best,
            "state_dict": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        },
        "checkpoint.pth.tar",
    )
    if is_best:
        shutil.copyfile("checkpoint.pth.tar", "model_best.pth.tar")
torch.save(model.state_dict(), "final.pt")
