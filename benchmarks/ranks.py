"""Real gloo ranks for a benchmark: started, waited for with a bound, and never left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

WORLD_SIZE = 2

COLLECTIVE_SECONDS = 180.0
"""A rank that waits longer for the other one has lost it."""


class RanksFailed(Exception):
    """A rank raised, died or did not answer; the text says which and how."""


def run_ranks(
    function: Callable[..., Any], log: Path, *args: Any, seconds: float = 3000.0
) -> list[Any]:
    """``function(rank, *args)`` on two new processes that share a gloo group; results by rank.

    Args:
        log: what the ranks print goes there.
        seconds: they are killed then.

    Raises:
        RanksFailed: with the last lines of the log.
    """
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    pipes, processes = [], []
    try:
        for rank in range(WORLD_SIZE):
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(
                target=_enter, args=(sending, function, rank, port, str(log), args)
            )
            process.start()
            sending.close()
            pipes.append(receiving)
            processes.append(process)
        results = [_receive(pipe, rank, log, seconds) for rank, pipe in enumerate(pipes)]
        for process in processes:
            process.join(30)
        return results
    finally:
        for process in processes:
            _kill(process)


def _receive(pipe: Connection, rank: int, log: Path, seconds: float) -> Any:
    limit = time.monotonic() + seconds
    while not wait([pipe], timeout=1.0):
        if time.monotonic() > limit:
            raise RanksFailed(f"rank {rank} did not end in {seconds:.0f} s:\n{_tail(log)}")
    try:
        failed, result = pipe.recv()
    except EOFError:
        raise RanksFailed(f"rank {rank} died:\n{_tail(log)}") from None
    if failed:
        raise RanksFailed(f"rank {rank}: {result}")
    return result


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        return log.read_text(errors="replace")[-3000:]
    return ""


def _kill(process: BaseProcess) -> None:
    """End it and what it started."""
    with contextlib.suppress(psutil.Error):
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for victim in tree:
            with contextlib.suppress(psutil.Error):
                victim.kill()
        psutil.wait_procs(tree, timeout=10)
    process.join(10)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _enter(
    pipe: Connection,
    function: Callable[..., Any],
    rank: int,
    port: int,
    log: str,
    args: tuple[Any, ...],
) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 2)
    os.dup2(fd, 1)
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", GROUP_WORLD_SIZE="1",
        WORLD_SIZE=str(WORLD_SIZE), LOCAL_WORLD_SIZE=str(WORLD_SIZE),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    os.environ.pop("ELASTIC_CKPT_DIR", None)
    # As a launcher does: each rank has its share of the cores.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORLD_SIZE))
    dist.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_SECONDS))
    try:
        pipe.send((False, function(rank, *args)))
    except Exception:
        pipe.send((True, traceback.format_exc()))
        os._exit(1)
    # Whoever hosts the store must not leave before the others have read from it.
    with contextlib.suppress(Exception):
        dist.barrier()
    os._exit(0)
