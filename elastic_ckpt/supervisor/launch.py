"""One launch of all workers of this node by torch elastic: the agent's one file with torch in it.

Torch elastic's own rendezvous for a changing set of nodes waits up to 0.3 s at random, so that
many nodes do not come at once. One node alone need not: it meets itself in a store of its own.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from typing import Any, Final

import msgspec

from elastic_ckpt.supervisor.messages import WorkerSpec

WORKER_ENTRY: Final = "elastic_ckpt.training.worker"
"""Named, not imported: the worker is another process, on the other side of the board."""

MONITOR_SECONDS: Final = 0.02
"""How often torch elastic looks at its workers, at about 0.2 ms a look."""

_ADDRESS: Final = "127.0.0.1"
_BACKEND: Final = "elastic-ckpt"


def enter_worker(module: str, spec: bytes) -> None:
    """What each forked worker runs; called by torch elastic."""
    from elastic_ckpt.supervisor import template

    template.quiet.__exit__(None, None, None)
    importlib.import_module(module).main(spec)


def prepare() -> None:
    """Import torch elastic, make the rendezvous known to it, and keep it quiet."""
    import torch.distributed.launcher.api  # noqa: F401
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        # They announce, with tracebacks, what the supervisor says in one line.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    rendezvous_handler_registry.register(_BACKEND, _one_node)


class Incarnation:
    """One launch of all workers of this node, in a thread of torch elastic."""

    def __init__(self, number: int, spec: WorkerSpec, wake: int) -> None:
        self.number = number
        self.error: BaseException | None = None
        self._spec = spec
        self._wake = wake
        self._over = False
        self._thread = threading.Thread(target=self._run, name="elastic", daemon=True)

    def start(self) -> None:
        """Launch; returns at once. ``wake`` gets a byte when all is over."""
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether torch elastic has returned."""
        return self._over

    def join(self, seconds: float) -> None:
        """Wait, bounded, for torch elastic."""
        self._thread.join(seconds)

    def _run(self) -> None:
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self._spec.nproc,
            run_id=f"{self._spec.job}.{self.number}",
            rdzv_backend=_BACKEND,
            rdzv_endpoint=f"{_ADDRESS}:0",
            max_restarts=0,
            monitor_interval=MONITOR_SECONDS,
            start_method="forkserver",
            local_addr=_ADDRESS,
        )
        try:
            payload = msgspec.json.encode(self._spec)
            elastic_launch(config, enter_worker)(WORKER_ENTRY, payload)
        except BaseException as error:  # every end of the launch is an end of the incarnation
            self.error = error
        finally:
            # Before the byte: whoever it wakes must find the incarnation over.
            self._over = True
            os.write(self._wake, b"x")


def _one_node(parameters: Any) -> Any:
    """The rendezvous of a node that is alone: a fresh store, and no waiting.

    Workers use the same store, as they do with torch elastic's own rendezvous.
    """
    from torch import distributed
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo
    from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

    dist: Any = distributed  # its stores are public, but carry no types

    class OneNode(RendezvousHandler):
        use_agent_store = True

        def get_backend(self) -> str:
            return _BACKEND

        def get_run_id(self) -> str:
            return str(parameters.run_id)

        def next_rendezvous(self) -> RendezvousInfo:
            store = dist.TCPStore(_ADDRESS, 0, is_master=True, wait_for_workers=False)
            return RendezvousInfo(
                dist.PrefixStore(self.get_run_id(), store),
                rank=0,
                world_size=1,
                bootstrap_store_info=RendezvousStoreInfo(_ADDRESS, store.port),
            )

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            return

        def num_nodes_waiting(self) -> int:
            return 0

        def shutdown(self) -> bool:
            return True

    return OneNode()
