"""Scripts that do not behave: ``odd.py WHAT [ARGUMENT]``; the steps need no DataLoader children."""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import ElasticSampler, Session

WHAT, *ARGUMENTS = sys.argv[1:]
RANK = int(os.environ.get("RANK", "0"))


def misbehave(step):
    """Do what the test asks for; every rank calls it in every step."""
    last = int(os.environ["WORLD_SIZE"]) - 1
    if step != 3 or last != RANK:
        return
    if WHAT == "exit":
        sys.exit(int(ARGUMENTS[0]))
    elif WHAT == "text":
        sys.exit(ARGUMENTS[0])
    elif WHAT == "raise":
        raise ValueError(ARGUMENTS[0])
    elif WHAT == "leave":
        os._exit(int(ARGUMENTS[0]))
    elif WHAT == "signal":
        os.kill(os.getpid(), int(ARGUMENTS[0]))
    elif WHAT == "raise-with-thread":
        threading.Thread(target=time.sleep, args=(600,)).start()
        raise ValueError("a thread lives on")
    elif WHAT == "fork" and os.fork() == 0:
        sys.exit(0)


def train():
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = nn.Linear(1, 1)
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    data = TensorDataset(torch.arange(1000.0).unsqueeze(1))
    loader = DataLoader(data, sampler=ElasticSampler(data, seed=1))
    with Session(model=model, optimizer=optimizer) as session:
        for _ in session.epochs(1):
            for (batch,) in session.batches(loader):
                model(batch).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                misbehave(session.step + 1)
                print("step", session.step + 1)
                time.sleep(0.02)


def stop_by_itself():
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    print("up")
    while not stopped.is_set():  # a wait without a limit would keep the handler from running
        stopped.wait(0.05)
    sys.exit(0)


def start_children():
    """Check that SIGTERM ends a child and that exit handlers run."""
    atexit.register(lambda: open(ARGUMENTS[0], "w").close())
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    child.terminate()
    child.join(10)
    survived = child.is_alive()
    child.kill()
    sys.exit(9 if survived else 0)


if __name__ == "__main__":
    {"stop-by-itself": stop_by_itself, "children": start_children}.get(WHAT, train)()
