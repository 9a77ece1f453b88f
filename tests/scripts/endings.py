"""Scripts that end in many ways: ``endings.py WHAT [DIRECTORY]``; a Session has 16 steps."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

WHAT = sys.argv[1]
RANK = int(os.environ.get("RANK", "0"))
PLACE = Path(sys.argv[2]) if len(sys.argv) > 2 else Path()


class EarlyStop(Exception):
    """A script's own way out of its loop."""


def train(at_step=None, after=None, in_step=None):
    """Train 16 steps, calling ``in_step`` within and ``at_step`` after each, and ``after`` inside
    the Session."""
    import torch
    import torch.distributed as dist
    from torch.utils.data import DataLoader, TensorDataset

    from elastic_ckpt import ElasticSampler, Session

    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = torch.nn.Linear(1, 1)
    if dist.is_initialized():
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    ranks = int(os.environ["WORLD_SIZE"])
    data = TensorDataset(torch.arange(16.0 * ranks).unsqueeze(1))
    loader = DataLoader(data, sampler=ElasticSampler(data, seed=1))
    with Session(model=model, optimizer=optimizer, save_interval=5) as session:
        for _ in session.epochs(1):
            for (batch,) in session.batches(loader):
                model(batch).sum().backward()
                if in_step is not None:
                    in_step(session.step + 1)
                optimizer.step()
                optimizer.zero_grad()
                time.sleep(0.02)
                if at_step is not None:
                    at_step(session.step + 1)
        if after is not None:
            after()


def first_time():
    """Whether this is called in the first incarnation."""
    return os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"


def at_eight(act, *, rank=None, once=False):
    def hook(step):
        if step == 8 and rank in (None, RANK) and (first_time() or not once):
            act()

    return hook


def stop():
    raise EarlyStop


def swallow():
    try:
        train(at_eight(stop))
    except EarlyStop:
        print("stopped early")


def fail_in_a_thread():
    thread = threading.Thread(target=stop)
    thread.start()
    thread.join()


def handle_signal():
    """Save on SIGTERM and return, with the former handler back in place, as HF Trainer does."""
    stopped = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    print("up", flush=True)
    while not stopped.is_set():
        stopped.wait(0.05)
    signal.signal(signal.SIGTERM, before)


def daemonize():
    if os.fork():
        sys.exit(0)
    os.setsid()
    time.sleep(600)


def in_spawned_process(rank):
    import torch

    from elastic_ckpt import Session

    Session(model=torch.nn.Linear(1, 1)).__enter__()


def spawn(function):
    import torch.multiprocessing

    torch.multiprocessing.spawn(function, nprocs=2)


def fail_once_later():
    """Fail once after a while of work, without a Session."""
    for step in range(60):
        time.sleep(0.06)
        if step == 58 and first_time():
            raise ConnectionError("the tracker does not answer")


def evaluate():
    """The work after the last step; the test preempts it once."""
    (PLACE / f"evaluates-{RANK}").touch()
    while not (PLACE / "may-end").exists():
        time.sleep(0.02)


ENDINGS = {
    "return": train,
    "exit-after": lambda: (train(), sys.exit(0)),
    "os-exit-after": lambda: (train(), os._exit(0)),
    "os-exit-one-after": lambda: (train(), os._exit(0) if RANK == 0 else None),
    "os-exit-in-tail": lambda: train(after=lambda: os._exit(0)),
    "exit-all": lambda: train(at_eight(lambda: sys.exit(0))),
    "exit-within": lambda: train(in_step=at_eight(lambda: sys.exit(0))),
    "exit-one": lambda: train(at_eight(lambda: sys.exit(0), rank=0, once=True)),
    "os-exit-one": lambda: train(at_eight(lambda: os._exit(0), rank=1, once=True)),
    "exit-before": lambda: sys.exit(0) if RANK == 0 and first_time() else train(),
    "swallow": swallow,
    "thread": lambda: train(at_eight(fail_in_a_thread)),
    "evaluate": lambda: train(after=evaluate),
    "plain-exit": lambda: sys.exit(0),
    "plain-os-exit": lambda: os._exit(0),
    "handle-signal": handle_signal,
    "daemon": daemonize,
    "spawn": lambda: spawn(print),
    "spawn-session": lambda: spawn(in_spawned_process),
    "fail-once-later": fail_once_later,
}

if __name__ == "__main__":
    ENDINGS[WHAT]()
