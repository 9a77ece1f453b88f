"""A training script for the benchmarks that start a whole job.

Under ``elastic-ckpt run`` it uses a Session; with ``--plain FILE`` it saves and loads by itself, as
scripts under torchrun do. Each rank writes "step time pid" to ``--trace`` at the end of each step,
the time on the machine's monotonic clock.
"""

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset
from training_state import TrainingState, make_state

from elastic_ckpt import ElasticSampler, Session

LIGHT = "--light"

if LIGHT not in sys.argv:
    with contextlib.suppress(ImportError):
        import colossalai
        import colossalai.booster
        import colossalai.booster.plugin  # noqa: F401  # what a script that trains with it imports


def train(state: TrainingState, batch: torch.Tensor, pause: float) -> None:
    """One step: the loss touches the first layer, the optimizer all of them."""
    loss = state.model(batch).pow(2).mean()
    loss.backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    time.sleep(pause)


def main() -> None:
    """Train until it is killed, or for so many steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", required=True, help="its rank is appended")
    parser.add_argument("--size", type=float, default=24.0, help="MB of state")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds of a step that sleep")
    parser.add_argument("--sleep-from", type=int, default=0, help="sleep for good after this step")
    parser.add_argument("--every", type=int, default=10, help="steps between two saves")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument(LIGHT, action="store_true", help="leave ColossalAI out")
    parser.add_argument("--plain", help="save and load this file without elastic-ckpt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    state = make_state(args.size, wrap=True)
    width = next(state.bare.parameters()).shape[1]
    trace = open(f"{args.trace}.{dist.get_rank()}", "a", buffering=1)  # noqa: SIM115  # until the end

    def tell(step: int) -> None:
        trace.write(f"{step} {time.monotonic()} {os.getpid()}\n")

    if args.plain:
        train_plain(args, state, torch.randn(2, width), tell)
        return
    data = TensorDataset(torch.randn(4 * args.steps, 1))
    loader = DataLoader(data, batch_size=2, sampler=ElasticSampler(data, seed=0))
    with Session(model=state.model, optimizer=state.optimizer, save_interval=args.every) as session:
        for _ in session.epochs(1):
            for (numbers,) in session.batches(loader):
                train(state, numbers.expand(-1, width), args.pause)
                tell(session.step + 1)
                while args.sleep_from and session.step + 1 >= args.sleep_from:
                    time.sleep(60)


def train_plain(args, state, batch, tell) -> None:
    """What a script does that knows nothing of us: rank 0 saves, everybody loads."""
    begin = 0
    if os.path.exists(args.plain):
        found = torch.load(args.plain, weights_only=True)
        state.bare.load_state_dict(found["model"])
        state.optimizer.load_state_dict(found["optimizer"])
        begin = found["step"]
    for step in range(begin + 1, args.steps + 1):
        train(state, batch, args.pause)
        tell(step)
        if step % args.every == 0 and dist.get_rank() == 0:
            torch.save({**state.state_dict(), "step": step}, args.plain + ".new")
            os.replace(args.plain + ".new", args.plain)


if __name__ == "__main__":
    main()
