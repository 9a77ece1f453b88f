"""Real ranks over gloo, forked from a process that has imported torch once.

A rank saves the old checkpoint together with the others; the one that is to be traced then stops
itself, and all continue with the new one. Each rank writes the outcome of its saves to a file.
"""

from __future__ import annotations

import contextlib
import os
import signal
from datetime import timedelta
from pathlib import Path

import safetensors.torch  # noqa: F401  imported here once instead of in every rank
import torch
import torch.distributed as dist

from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.errors import SaveFailed
from elastic_ckpt.training import runtime as runtimes
from elastic_ckpt.training.engines import Engine, EngineInputs, make_engine
from elastic_ckpt.training.state.save import write_checkpoint
from elastic_ckpt.training.state.snapshot import Snapshot
from tests.faults.store_writer import OLD, fork, serve

WORLD_SIZE = 2
ENDED = "ended"
"""The last line of a rank that came to its end."""


def save(root: Path, step: int, rank: int) -> None:
    """Make one collective save; files depend on the step, and a rank's own on the rank, too."""
    engine = trained(step)
    state = {"rank": rank, "step": step, "noise": torch.full((step,), float(rank))}
    snapshot = Snapshot(
        reason="interval",
        position=Position(epoch=0, step=step, step_in_epoch=step, sample_start_index=8 * step),
        running_states={"epoch": 0, "step": step, "sample_start_index": 4 * step},
        samples_per_step=8,
        data_parallel_size=WORLD_SIZE,
        rank_state=lambda: state,
    )
    write_checkpoint(runtimes.join(root), engine, snapshot)


def trained(step: int) -> Engine:
    """Return a model and optimizer after one step, made without autograd, which has threads."""
    torch.manual_seed(step)
    model = torch.nn.Linear(8, step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return make_engine(EngineInputs(None, model, optimizer, scheduler))


def live(rank: int, port: int, root: Path, outcomes: Path, traced: bool, steps: list[int]) -> int:
    """Run a rank after the fork; return its exit code."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE),
        LOCAL_WORLD_SIZE=str(WORLD_SIZE), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    os.environ.pop("ELASTIC_CKPT_DIR", None)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    save(root, OLD, rank)
    if traced:
        os.kill(os.getpid(), signal.SIGSTOP)
    with open(outcomes, "w", buffering=1) as report:
        for step in steps:
            try:
                save(root, step, rank)
            except SaveFailed as error:
                print(f"{step} failed {error}", file=report)
            else:
                print(f"{step} sealed", file=report)
        # A rank that hosts the store must not leave before the others have read their verdicts.
        with contextlib.suppress(RuntimeError):
            dist.barrier()
        print(ENDED, file=report)
    return 0


def _start(
    rank: int, port: int, root: str, outcomes: str, printed: str, traced: bool, steps: list[int]
) -> int:
    return fork(printed, lambda: live(rank, port, Path(root), Path(outcomes), traced, steps))


def _warm(root: Path) -> None:
    """Import what torch imports late, without threads, which would not survive the fork."""
    torch.set_num_threads(1)
    trained(OLD)


if __name__ == "__main__":
    serve(_warm, _start)
