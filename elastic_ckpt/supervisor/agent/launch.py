"""One launch of this node's workers by torch elastic: the agent's one file with torch in it.

Torch elastic's own rendezvous finds out who is there: it waits up to 0.3 s at random, looks once a
second, and has its own idea of when a node is lost. Here the head has found that out before, see
``protocol/cluster.py``; what is left is to meet in a store that is fresh for each incarnation.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import msgspec

from elastic_ckpt.protocol.messages import WorkerSpec
from elastic_ckpt.protocol.rendezvous import Rendezvous

log = logging.getLogger(__name__)

WORKER_ENTRY: Final = "elastic_ckpt.training.worker.worker"
"""Named, not imported: the worker is another process, on the other side of the board."""

MONITOR_SECONDS: Final = 0.02
"""How often torch elastic looks at its workers, at about 0.2 ms a look."""

LOOPBACK: Final = "127.0.0.1"

STORE_SECONDS: Final = 2.0
"""Until a call of the job's store fails that is not answered."""

_CPP_LEVEL: Final = "TORCH_CPP_LOG_LEVEL"
_BACKEND: Final = "elastic-ckpt"


def enter_worker(module: str, spec: bytes, restarts: int) -> None:
    """What each forked worker runs; called by torch elastic, which has set its variables."""
    from elastic_ckpt.supervisor.agent import template

    template.quiet.__exit__(None, None, None)
    _complete_environment(restarts)
    importlib.import_module(module).main(spec)


def _complete_environment(restarts: int) -> None:
    """What torch elastic's variables leave out, or say of its own launches alone.

    In a job of SLURM these are the supervisor's, of which there is one on each node; here they are
    the rank's, as if srun had started it. ``colossalai.launch_from_slurm`` reads them.
    """
    environ = os.environ
    environ["SLURM_PROCID"] = environ["RANK"]
    environ["SLURM_LOCALID"] = environ["LOCAL_RANK"]
    environ["SLURM_NTASKS"] = environ["SLURM_NPROCS"] = environ["WORLD_SIZE"]
    environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts)  # each incarnation is a launch of its own


def prepare() -> None:
    """Import torch elastic, make the rendezvous known to it, and keep both quiet."""
    before = os.environ.get(_CPP_LEVEL)
    os.environ.setdefault(_CPP_LEVEL, "ERROR")  # a node that has gone is told in one line, too
    import torch.distributed.launcher.api  # noqa: F401
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    if before is None:
        os.environ.pop(_CPP_LEVEL)
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        # They announce, with tracebacks, what the supervisor says in one line.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    rendezvous_handler_registry.register(_BACKEND, _known_nodes)


@dataclass(frozen=True)
class NodeRank:
    """This node's place in an incarnation.

    Attributes:
        number: of the incarnation.
        node, nodes: this node's group rank, and how many there are.
        address, port: of the store that the workers meet in.
        store: that store, on the node that hosts it.
    """

    number: int
    node: int
    nodes: int
    address: str
    port: int
    store: Any = None

    @classmethod
    def alone(cls, number: int) -> NodeRank:
        """One node, which meets itself."""
        store = host_workers(LOOPBACK)
        return cls(number, 0, 1, LOOPBACK, store.port, store)


class ElasticLaunch:
    """One launch of this node's workers, in a thread of torch elastic."""

    def __init__(self, node_rank: NodeRank, spec: WorkerSpec, wake: int) -> None:
        self.number = node_rank.number
        self.error: BaseException | None = None
        self._node_rank = node_rank
        self._spec = msgspec.structs.replace(spec, incarnation=node_rank.number)
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

        node_rank = self._node_rank
        config = LaunchConfig(
            min_nodes=node_rank.nodes,
            max_nodes=node_rank.nodes,
            nproc_per_node=self._spec.nproc,
            run_id=f"{self._spec.job}.{self.number}",
            rdzv_backend=_BACKEND,
            rdzv_endpoint=f"{node_rank.address}:{node_rank.port}",
            rdzv_configs={"node_rank": node_rank},
            max_restarts=0,
            monitor_interval=MONITOR_SECONDS,
            start_method="forkserver",
            local_addr=node_rank.address,
        )
        try:
            payload = msgspec.json.encode(self._spec)
            elastic_launch(config, enter_worker)(WORKER_ENTRY, payload, self.number - 1)
        except BaseException as error:  # every end of the launch is an end of the incarnation
            self.error = error
            if not hasattr(error, "failures"):  # of workers, which are told of elsewhere
                log.exception("torch elastic failed")
        finally:
            # Before the byte: whoever it wakes must find the incarnation over.
            self._over = True
            os.write(self._wake, b"x")


def host_workers(address: str) -> Any:
    """A store for one incarnation's workers; it ends with the last reference to it."""
    return _stores().TCPStore(address, 0, is_master=True, wait_for_workers=False)


def connect(rendezvous: Rendezvous) -> Any:
    """A connection to the job's store, which the head hosts on the socket that it listens on.

    Raises:
        RuntimeError, OSError: nobody answers.
    """
    host, port = rendezvous.host, rendezvous.port
    limit = timedelta(seconds=STORE_SECONDS)
    if not rendezvous.leads:
        # Torch's own attempt prints warnings for as long as nobody listens.
        socket.create_connection((host, port), timeout=STORE_SECONDS).close()
        return _stores().TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=limit
        )
    return _stores().TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=limit,
        master_listen_fd=os.dup(rendezvous.listen_fd),
        use_libuv=False,  # which in torch 2.5 cannot take a socket over
    )


def _known_nodes(parameters: Any) -> Any:
    """The rendezvous of nodes that are known: each takes its place, and nobody waits.

    Workers use the same store, as they do with torch elastic's own rendezvous.
    """
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo
    from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

    node_rank: NodeRank = parameters.config["node_rank"]

    class KnownNodes(RendezvousHandler):
        use_agent_store = True

        def get_backend(self) -> str:
            return _BACKEND

        def get_run_id(self) -> str:
            return str(parameters.run_id)

        def next_rendezvous(self) -> RendezvousInfo:
            store = node_rank.store or _stores().TCPStore(
                node_rank.address, node_rank.port, is_master=False, wait_for_workers=False
            )
            return RendezvousInfo(
                _stores().PrefixStore(self.get_run_id(), store),
                rank=node_rank.node,
                world_size=node_rank.nodes,
                bootstrap_store_info=RendezvousStoreInfo(node_rank.address, node_rank.port),
            )

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            return

        def num_nodes_waiting(self) -> int:
            return 0  # the head stops the incarnation for them

        def shutdown(self) -> bool:
            return True

    return KnownNodes()


def _stores() -> Any:
    from torch import distributed

    return distributed  # its stores are public, but carry no types
