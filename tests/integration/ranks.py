"""Run a function on real gloo ranks and collect what each returned, raised or exited with.

Ranks fork from a server that has imported what takes long. With another backend they start from
scratch: importing ColossalAI initializes CUDA, and a process forked after that cannot use it.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import traceback
from datetime import timedelta
from multiprocessing import forkserver, reduction
from queue import Empty
from typing import Any
from unittest import mock

from tests.ports import free_port

HEAVY = [
    "pytest",
    "numpy.random",
    "torch.distributed",
    "torch._dynamo",  # the first optimizer imports it, which takes most of a second
    "torch.nn.parallel",
    "elastic_ckpt.training.session",
    "elastic_ckpt.training.solo",
    "elastic_ckpt.training.engines.torch.engine",
    "colossalai.booster.plugin",
    "colossalai.shardformer.policies.llama",
    "transformers.models.llama.modeling_llama",
]
"""Python has one fork server per process, so all tests share one list of imports."""


def run_ranks(
    function, world_size: int, *args: Any, seconds: float = 90.0, backend: str = "gloo"
) -> list[Any]:
    """Run ``function(rank, *args)`` in ``world_size`` new processes and return results by rank.

    A rank that raised yields the exception's (type name, text); one that returned nothing,
    its exit code. With nccl in ``backend`` each rank has the GPU of its number.
    """
    context = server() if backend == "gloo" else multiprocessing.get_context("spawn")
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
        with contextlib.suppress(Empty):
            while True:
                # A rank that ended with 0 has written its result.
                rank, result = queue.get(timeout=10 if 0 in results else 0)
                results[rank] = [result]
        return [result[0] if isinstance(result, list) else result for result in results]
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
                process.join(10)


def server() -> Any:
    """Return the context whose processes fork from the server with the heavy imports."""
    context: Any = multiprocessing.get_context("forkserver")
    # Looking for a module inside a package would import the package.
    installed = [name for name in HEAVY if importlib.util.find_spec(name.partition(".")[0])]
    context.set_forkserver_preload(installed)
    with mock.patch.dict(os.environ, {"TORCH_WARM_POOL": "0"}):  # no processes for torch.compile
        forkserver.ensure_running()
    return context


def _variables(rank: int, world_size: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}


class Errors:
    """This process's standard error, for a rank: the server still has an earlier test's."""

    def __reduce__(self):
        return _take_over, (reduction.DupFd(2),)


def _take_over(descriptor) -> Any:
    os.dup2(descriptor.detach(), 2)


def _enter(_, queue, environment, backend, function, rank, args) -> None:
    os.environ.clear()  # the server still has an earlier test's
    os.environ.update(environment)
    os.environ.pop("ELASTIC_CKPT_DIR", None)
    # As a worker does: a loader's children are forked. From a server of the rank's own they start
    # in seconds, and outlive the rank.
    multiprocessing.set_start_method(None, force=True)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # as elastic-ckpt run and torchrun have it
    if "nccl" in backend:
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
    with contextlib.suppress(Exception):
        leave(rank, dist.get_world_size(), dist.distributed_c10d._get_default_store())
    os._exit(0)


def leave(rank: int, world_size: int, store: Any) -> None:
    """Leave at once, as a script would; rank 0 hosts the store, and waits for the others' reads."""
    store.set(f"left/{rank}", b"")
    if rank == 0:
        store.wait([f"left/{rank}" for rank in range(world_size)], timedelta(seconds=60))
