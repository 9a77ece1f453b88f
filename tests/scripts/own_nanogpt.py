"""A loop that overwrites one ckpt.pt, as small language models are often trained: resumes on
request, draws its batches by iteration, and knows nothing of elastic-ckpt."""

import argparse
import os
import signal
import time

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--out_dir", default="out")
parser.add_argument("--init_from", default="scratch", choices=["scratch", "resume"])
parser.add_argument("--max_iters", type=int, default=40)
parser.add_argument("--eval_interval", type=int, default=10)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--handler", action="store_true", help="save and leave on SIGTERM")
parser.add_argument("--continue_on_usr1", action="store_true", help="save on SIGUSR1")
parser.add_argument("--replace", action="store_true", help="write beside it, and rename")
parser.add_argument("--tear_at", type=int, default=0, help="die in the middle of this save, once")
parser.add_argument("--step_file", default="", help="a file that holds the iteration")
args = parser.parse_args()

asked = []
if args.handler:
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
if args.continue_on_usr1:
    signal.signal(signal.SIGUSR1, lambda number, _: asked.append(number))

torch.manual_seed(7)
model = nn.Sequential(nn.Embedding(16, 8), nn.Flatten(), nn.Linear(32, 16))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
path, iteration = os.path.join(args.out_dir, "ckpt.pt"), 0
os.makedirs(args.out_dir, exist_ok=True)
if args.init_from == "resume":
    found = torch.load(path, weights_only=True)
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    iteration = found["iter_num"]
    print(f"resumed at {iteration}", flush=True)


def batch(number):
    generator = torch.Generator().manual_seed(1000 + number)
    return (
        torch.randint(16, (8, 4), generator=generator),
        torch.randint(16, (8,), generator=generator),
    )


def save():
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "iter_num": iteration,
    }
    if args.replace:
        torch.save(state, path + ".new")
        os.replace(path + ".new", path)
        return
    torch.save(state, path)
    mark = os.path.join(args.out_dir, "torn")
    if args.tear_at == iteration and not os.path.exists(mark):
        open(mark, "w").close()
        os.truncate(path, os.path.getsize(path) // 2)  # as far as it came
        os.kill(os.getpid(), signal.SIGKILL)


while iteration < args.max_iters:
    inputs, targets = batch(iteration)
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    iteration += 1
    time.sleep(args.pause)
    if args.step_file:
        with open(args.step_file + ".new", "w") as file:
            file.write(str(iteration))
        os.replace(args.step_file + ".new", args.step_file)
    if iteration % args.eval_interval == 0 or asked:
        save()
        if signal.SIGTERM in asked:
            print("saved, leaving", flush=True)
            raise SystemExit(0)
        asked.clear()
torch.save(model.state_dict(), os.path.join(args.out_dir, "final.pt"))
