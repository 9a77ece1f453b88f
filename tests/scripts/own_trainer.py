"""A trainer's directories: checkpoint-N, the state written last, the oldest rotated away; its own
search takes the largest number. Dropout, so the generator's state is saved, too."""

import argparse
import json
import os
import re
import shutil
import signal
import time

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", default="out")
parser.add_argument("--resume_from_checkpoint", default="")
parser.add_argument("--find", action="store_true", help="resume from its own newest")
parser.add_argument("--max_steps", type=int, default=40)
parser.add_argument("--save_steps", type=int, default=10)
parser.add_argument("--save_total_limit", type=int, default=0)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--signal", default="", help="save on this signal, and continue")
parser.add_argument("--tear_at", type=int, default=0, help="die in the middle of this save, once")
args = parser.parse_args()

asked = []
if args.signal:
    signal.signal(getattr(signal, args.signal), lambda number, _: asked.append(number))
torch.manual_seed(5)
model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
os.makedirs(args.output_dir, exist_ok=True)


def steps_there():
    names = (re.fullmatch(r"checkpoint-(\d+)", name) for name in os.listdir(args.output_dir))
    return sorted(int(name[1]) for name in names if name)


def save(step):
    path = os.path.join(args.output_dir, f"checkpoint-{step}")
    os.makedirs(path, exist_ok=True)
    torch.save(model.state_dict(), os.path.join(path, "model.bin"))
    mark = os.path.join(args.output_dir, "torn")
    if step == args.tear_at and not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save(optimizer.state_dict(), os.path.join(path, "optimizer.pt"))
    torch.save(torch.get_rng_state(), os.path.join(path, "rng_state.pth"))
    with open(os.path.join(path, "trainer_state.json"), "w") as file:
        json.dump({"global_step": step}, file)
    if args.save_total_limit:
        for old in steps_there()[: -args.save_total_limit]:
            shutil.rmtree(os.path.join(args.output_dir, f"checkpoint-{old}"))


step, start = 0, args.resume_from_checkpoint
if args.find and steps_there():
    start = os.path.join(args.output_dir, f"checkpoint-{steps_there()[-1]}")
if start:
    model.load_state_dict(torch.load(os.path.join(start, "model.bin"), weights_only=True))
    optimizer.load_state_dict(torch.load(os.path.join(start, "optimizer.pt"), weights_only=True))
    torch.set_rng_state(torch.load(os.path.join(start, "rng_state.pth"), weights_only=True))
    with open(os.path.join(start, "trainer_state.json")) as file:
        step = json.load(file)["global_step"]
    print(f"resumed from {os.path.basename(start)}", flush=True)
while step < args.max_steps:
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    loss = (model(inputs) - inputs.sum(1, keepdim=True)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1
    time.sleep(args.pause)
    if step % args.save_steps == 0 or asked:
        asked.clear()
        save(step)
torch.save(model.state_dict(), os.path.join(args.output_dir, "final.pt"))
