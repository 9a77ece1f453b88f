"""Run a function on real gloo ranks and collect what each returned, raised or exited with."""

import contextlib
import multiprocessing
import os
import socket
import traceback
from typing import Any


def run_ranks(function, world_size: int, *args: Any, seconds: float = 90.0) -> list[Any]:
    """``function(rank, *args)`` in ``world_size`` new processes; the results, by rank.

    A rank that raised yields the exception's (type name, text); one that ended without a word,
    its exit code.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_enter, args=(queue, function, rank, world_size, port, args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(seconds)
        results: list[Any] = [process.exitcode for process in ranks]
        with contextlib.suppress(Exception):
            while True:
                rank, result = queue.get(timeout=0.5)
                results[rank] = result
        return results
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
                process.join(10)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _enter(queue, function, rank, world_size, port, args) -> None:
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    os.environ.pop("ELASTIC_CKPT_DIR", None)
    dist.init_process_group("gloo")
    try:
        result = function(rank, *args)
    except Exception as error:
        traceback.print_exc()
        result = (type(error).__name__, str(error))
    queue.put((rank, result))
    queue.close()
    queue.join_thread()
    # A rank that hosts the store must not leave before the others have read their verdicts.
    with contextlib.suppress(Exception):
        dist.barrier()
    os._exit(0)
