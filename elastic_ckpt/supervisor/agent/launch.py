"""Launches this node's workers through torch elastic: the agent's only file that imports torch.

Torch elastic's own rendezvous discovers the nodes: it waits up to 0.3 s at random, polls once a
second, and has its own rule for lost nodes. Here the head already knows the nodes (see
``protocol/cluster.py``); they only meet in a store that is new for each incarnation.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from typing import Any, ClassVar, Final

import msgspec
import psutil

from elastic_ckpt.protocol.worker_spec import WorkerSpec

log = logging.getLogger(__name__)

WORKER_ENTRY: Final = "elastic_ckpt.training.worker.worker"
"""A name, not an import: the worker is another process, on the other side of the board."""

MONITOR_SECONDS: Final = 0.02
"""Interval at which torch elastic polls its workers; a poll costs about 0.2 ms."""

LOOPBACK: Final = "127.0.0.1"

WARM_VARIABLE: Final = "ELASTIC_CKPT_TEMPLATE_WARM"
"""Path of the pipe to which the template writes once it has imported everything."""

RUN_ID_CHARACTERS: Final = 40
"""Torch elastic makes a directory's name of this and more, and names end at 255 bytes."""

_CPP_LEVEL: Final = "TORCH_CPP_LOG_LEVEL"
_BACKEND: Final = "elastic-ckpt"


def enter_worker(module: str, spec: bytes, restarts: int) -> None:
    """Run a worker in its forked process, where torch elastic has set its variables."""
    from elastic_ckpt.supervisor.agent import template

    template.leave()
    _complete_environment(restarts)
    importlib.import_module(module).main(spec)


def _complete_environment(restarts: int) -> None:
    """Set the variables that torch elastic leaves out or counts per launch.

    In a SLURM job the supervisor is the task, one on each node, and the variables describe it;
    here they describe the rank, as if srun had started it, for ``colossalai.launch_from_slurm``.
    """
    environ = os.environ
    environ["SLURM_PROCID"] = environ["RANK"]
    environ["SLURM_LOCALID"] = environ["LOCAL_RANK"]
    environ["SLURM_NTASKS"] = environ["SLURM_NPROCS"] = environ["WORLD_SIZE"]
    environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts)  # each incarnation is its own launch


def prepare() -> None:
    """Import torch elastic, register the rendezvous with it, and silence its logs."""
    before = os.environ.get(_CPP_LEVEL)
    os.environ.setdefault(_CPP_LEVEL, "ERROR")  # the agent reports a lost node in one line
    import torch.distributed.launcher.api  # noqa: F401
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    if before is None:
        os.environ.pop(_CPP_LEVEL)
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        # They print tracebacks of failures that the supervisor reports in one line.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    rendezvous_handler_registry.register(_BACKEND, _known_nodes)
    ForkServerContext.Process = WorkerProcess


class _StatusPopen(Popen):
    """Lets several threads ask for an exit status, which a pipe delivers only once."""

    _reading: ClassVar = threading.Lock()

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit status; None while the process runs, unless ``flag`` is 0."""
        ended = wait([self.sentinel], 0 if flag == os.WNOHANG else None)
        if not ended and self.returncode is None:
            return None
        with self._reading:
            return super().poll(flag)


class WorkerProcess(ForkServerProcess):
    """The agent's handle of a worker, kept from its start: torch elastic does not expose its own.

    Attributes:
        started: handles of the workers that torch elastic has started, the oldest first.
        running: identifies the process even after the kernel has reused its pid.
    """

    started: ClassVar[list[WorkerProcess]] = []
    running: psutil.Process | None = None

    @staticmethod
    def _Popen(process_obj: Any) -> Popen:
        return _StatusPopen(process_obj)

    def start(self) -> None:
        """Fork it from the template."""
        super().start()
        with contextlib.suppress(psutil.NoSuchProcess):
            self.running = psutil.Process(self.pid)
        self.started.append(self)

    @property
    def is_there(self) -> bool:
        """Whether the process runs; unlike ``is_alive`` safe in any thread."""
        running = self.running
        with contextlib.suppress(psutil.NoSuchProcess):
            return running is not None and running.status() != psutil.STATUS_ZOMBIE
        return False

    def send_signal(self, number: int) -> bool:
        """Send a signal; whether the process was there to take it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.running is not None:
                self.running.send_signal(number)
                return True
        return False


@dataclass(frozen=True)
class NodeRank:
    """This node's group rank in an incarnation, and where its workers meet the others'.

    Attributes:
        node, nodes: this node's group rank, and the number of nodes.
        address, port: where the workers' store listens.
        store: that store, on the node that hosts it.
        arguments: what the script gets after its own.
        abandoned: set to have torch elastic's thread end, which may wait for a worker for ever.
    """

    number: int
    node: int
    nodes: int
    address: str
    port: int
    store: Any = None
    arguments: tuple[str, ...] = ()
    abandoned: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def alone(cls, number: int, arguments: tuple[str, ...] = ()) -> NodeRank:
        """Return the rank of a job's only node."""
        store = host_workers(LOOPBACK)
        return cls(number, 0, 1, LOOPBACK, store.port, store, arguments)


class ElasticLaunch:
    """One launch of this node's workers, in a thread that torch elastic blocks.

    Attributes:
        over: whether torch elastic has returned.
        failures: what torch elastic recorded of failed workers, by rank: one, often not the first.
        error: why the launch itself failed; None if it did not.
    """

    def __init__(self, node_rank: NodeRank, spec: WorkerSpec, wake: int) -> None:
        self.number = node_rank.number
        self.failures: Mapping[int, Any] = {}
        self.error: BaseException | None = None
        self._node_rank = node_rank
        args = [*spec.args, *node_rank.arguments]
        self._spec = msgspec.structs.replace(spec, incarnation=node_rank.number, args=args)
        self._wake = wake
        self.over = False
        self._thread = threading.Thread(target=self._run, name="elastic", daemon=True)

    def start(self) -> None:
        """Launch, without waiting; ``wake`` receives a byte when torch elastic returns."""
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait up to this long for torch elastic to return."""
        self._thread.join(seconds)

    def abandon(self) -> None:
        """Have torch elastic return although workers did: it waits for return values for ever."""
        self._node_rank.abandoned.set()

    def _run(self) -> None:
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        node_rank = self._node_rank
        config = LaunchConfig(
            min_nodes=node_rank.nodes,
            max_nodes=node_rank.nodes,
            nproc_per_node=self._spec.nproc,
            run_id=run_id(self._spec.job, self.number),
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
        except BaseException as error:  # however the launch ends, the incarnation is over
            if hasattr(error, "failures"):
                self.failures = error.failures
            elif not isinstance(error, _Abandoned):
                self.error = error
                log.exception("torch elastic failed")
        finally:
            # Before the byte: the thread that it wakes must find the incarnation over.
            self.over = True
            os.write(self._wake, b"x")


class _Abandoned(Exception):
    """Ends torch elastic's loop, which asks its rendezvous for nodes at each turn."""


def run_id(job: str, number: int) -> str:
    """Return torch elastic's name for an incarnation, which becomes part of a file's name."""
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', job)[:RUN_ID_CHARACTERS]}.{number}"


def host_workers(address: str) -> Any:
    """Return a store for one incarnation's workers; it closes with the last reference to it."""
    return _stores().TCPStore(address, 0, is_master=True, wait_for_workers=False)


def _known_nodes(parameters: Any) -> Any:
    """Return a rendezvous of known nodes: each takes its rank, and none waits. As with torch
    elastic's own, workers use the same store."""
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
            if node_rank.abandoned.is_set():
                raise _Abandoned
            return 0  # the head ends the incarnation to admit more nodes

        def shutdown(self) -> bool:
            return True

    return KnownNodes()


def _stores() -> Any:
    from torch import distributed

    return distributed  # its stores are public, but carry no types
