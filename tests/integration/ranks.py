"""Run a function on real gloo ranks and collect what each returned, raised or exited with.

Ranks are forked from a server that has imported what takes long, and nothing more. With another
backend they start afresh: to import ColossalAI is to ask CUDA for its devices, and a process that
is forked after that cannot use them.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import socket
import traceback
from multiprocessing import reduction
from typing import Any

HEAVY = ["torch", "torch.distributed", "colossalai", "colossalai.booster.plugin"]


def run_ranks(
    function, world_size: int, *args: Any, seconds: float = 90.0, backend: str = "gloo"
) -> list[Any]:
    """``function(rank, *args)`` in ``world_size`` new processes; the results, by rank.

    A rank that raised yields the exception's (type name, text); one that ended without a word,
    its exit code. With nccl in ``backend`` each rank has the GPU of its number.
    """
    context: Any = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")
    context.set_forkserver_preload(_heavy())
    queue = context.Queue()
    now = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    ranks = [
        context.Process(
            target=_enter,
            args=(
                Errors(),
                queue,
                now | _variables(rank, world_size),
                backend,
                function,
                rank,
                args,
            ),
        )
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


def _heavy() -> list[str]:
    """What is installed of it; to ask for a package's part would import the package."""
    return [name for name in HEAVY if importlib.util.find_spec(name.partition(".")[0])]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _variables(rank: int, world_size: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}


class Errors:
    """This process's standard error, for a rank: the server has that of an earlier test."""

    def __reduce__(self):
        return _take_over, (reduction.DupFd(2),)


def _take_over(descriptor) -> Any:
    os.dup2(descriptor.detach(), 2)


def _enter(_, queue, environment, backend, function, rank, args) -> None:
    os.environ.clear()  # the server's is of an earlier test
    os.environ.update(environment)
    os.environ.pop("ELASTIC_CKPT_DIR", None)
    import torch.distributed as dist

    if "nccl" in backend:
        import torch

        torch.cuda.set_device(rank)
    dist.init_process_group(backend)
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
