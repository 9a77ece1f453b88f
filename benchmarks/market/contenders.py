"""What is compared in the market: launchers on the same hosts, with the same job.

The peers get help that elastic-ckpt does without: the store of their rendezvous is on a host of its
own that never goes, and a job script with careful saves.
"""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.cluster import Node
from tests.hosts import Hosts
from tests.job import environment

JOB = Path(__file__).parent / "job.py"
STORE = "h9"
"""The host of the peers' store."""
PORT = 29400
_STORE = f"""
import time, torch.distributed as dist
store = dist.TCPStore("{STORE}", {PORT}, is_master=True, wait_for_workers=False)
time.sleep(1e6)
"""


class Contender(Hosts):
    """elastic-ckpt on hosts h1 to hN.

    Args:
        size: MB of state.
        every: seconds between two saves; of elastic-ckpt's, between two snapshots.
    """

    name = "elastic-ckpt"
    keeps_on_notice = keeps_on_coming = in_memory = True
    keeps_on_loss = False

    def __init__(self, root: Path, count: int, size: float, every: float) -> None:
        options = ("--save-interval", f"{every}s", "--keep-last", "2", "--rdzv-timeout", "60")
        super().__init__(count, root, f"1:{count}", options=options, memory="4g")
        self.result, self.end = root / "result.json", root / "end"
        self.script = JOB
        self.arguments = [
            "--trace", str(root / "trace"), "--end", str(self.end),
            "--result", str(self.result), "--size", str(size), *self.own_saves(every),
        ]  # fmt: skip

    def own_saves(self, every: float) -> Sequence[str]:
        """The script's options for that."""
        return ()

    def come(self, host: str) -> None:
        """A host is there, with what starts its launcher at boot."""
        self.nodes[host] = self.make(host).start()

    def warn(self, host: str) -> None:
        """It gets notice."""
        self.nodes[host].process.send_signal(signal.SIGTERM)

    def go(self, host: str) -> None:
        """It is switched off."""
        self.lose(host)

    def ended(self, host: str) -> int | None:
        """Its launcher's exit code, or None while it runs."""
        return self.nodes[host].process.poll()


class PeerNode(Node):
    """One host with another launcher."""

    launcher: Sequence[str] = ()
    meeting: Sequence[str] = ()

    def start(self, *options: str) -> PeerNode:
        command = [
            *self.prefix, sys.executable, "-m", *self.launcher, "--nproc-per-node", "1",
            "--max-restarts", "10000", *self.meeting, *options, str(self.script), *self.arguments,
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**environment(), "TORCHFT_LIGHTHOUSE": f"http://{STORE}:{PORT}"},
            )  # fmt: skip
        return self


class Torchrun(Contender):
    """torchrun, and a save by rank 0 every so often."""

    name = "torchrun"
    keeps_on_notice = keeps_on_coming = in_memory = False
    launcher: Sequence[str] = ("torch.distributed.run",)
    store: Sequence[str] = (sys.executable, "-c", _STORE)
    """What the hosts meet at."""
    closed = b"RendezvousClosedError"
    """What a launcher prints whose job can never meet again under its id."""

    def __init__(self, root: Path, count: int, size: float, every: float) -> None:
        super().__init__(root, count, size, every)
        self._job = 1  # the number in its id
        self._started: dict[str, tuple[int, int]] = {}  # its job, and where its log begins

    def come(self, host: str) -> None:
        """Also under a new id if the old one is closed, as a platform or a person would."""
        log = self.root / f"log-{host}"
        said = log.read_bytes() if log.exists() else b""
        job, begin = self._started.get(host, (0, 0))
        if job == self._job and self.closed in said[begin:]:
            self._job += 1
        self._started[host] = self._job, len(said)
        super().come(host)

    def __enter__(self) -> Torchrun:
        self.names.append(STORE)
        super().__enter__()
        command = ["nsenter", *self._spaces(STORE), *self.store]
        self._store = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return self

    def __exit__(self, *about: object) -> None:
        self._store.kill()
        self._store.wait(10)
        super().__exit__(*about)

    def own_saves(self, every: float) -> Sequence[str]:
        return ("--plain", str(self.root / "saved"), "--every", str(every))

    def meeting(self, host: str) -> Sequence[str]:
        """The launcher's options for that."""
        conf = "is_host=0,last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
        return (
            "--nnodes", f"1:{len(self.names) - 1}", "--rdzv-backend", "c10d",
            "--rdzv-id", f"job{self._job}", "--rdzv-endpoint", f"{STORE}:{PORT}",
            "--rdzv-conf", conf, "--local-addr", host,
        )  # fmt: skip

    def make(self, name: str) -> Node:
        node = PeerNode(self, name)
        node.launcher, node.meeting = self.launcher, self.meeting(name)
        node.prefix = super().make(name).prefix
        return node


class TorchrunOnTerm(Torchrun):
    """The same, and a save of all ranks on SIGTERM."""

    name = "torchrun, own save on SIGTERM"
    keeps_on_notice = keeps_on_coming = True

    def own_saves(self, every: float) -> Sequence[str]:
        return (*super().own_saves(every), "--on-term")


class Nvrx(TorchrunOnTerm):
    """NVRx's launcher with that script."""

    name = "NVRx ft_launcher"
    launcher = (
        "nvidia_resiliency_ext.fault_tolerance.launcher", "--ignore-missing-fault-tol-cfg",
    )  # fmt: skip


class Torchft(Torchrun):
    """torchft: a replica on each host, which heals from the others; its lighthouse is the store."""

    name = "torchft"
    keeps_on_coming = keeps_on_loss = True
    store = (
        str(Path(sys.executable).with_name("torchft_lighthouse")), "--min_replicas", "1",
        "--heartbeat_timeout_ms", "2500", "--join_timeout_ms", "3000", "--bind", f"[::]:{PORT}",
    )  # fmt: skip

    def __init__(self, root: Path, count: int, size: float, every: float) -> None:
        super().__init__(root, count, size, every)
        self.script = Path(__file__).parent / "live_job.py"

    def meeting(self, host: str) -> Sequence[str]:
        return ("--standalone", "--local-addr", host)


CONTENDERS = {one.name: one for one in (Contender, Torchrun, TorchrunOnTerm, Nvrx, Torchft)}


def missing(contender: type[Contender]) -> str:
    """Why a contender cannot run here; empty if it can."""
    module = contender.launcher[0] if issubclass(contender, Torchrun) else "torch"
    module = "torchft" if contender is Torchft else module
    try:
        found = importlib.util.find_spec(module) is not None
    except ImportError:
        found = False
    return "" if found else f"{module} is not installed"
