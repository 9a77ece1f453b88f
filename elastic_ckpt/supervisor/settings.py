"""The settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from elastic_ckpt.errors import UsageError
from elastic_ckpt.policy.hang import MIN_HANG_SECONDS
from elastic_ckpt.policy.interval import DEFAULT_MTBF_SECONDS, SaveInterval
from elastic_ckpt.policy.own_saves import OwnSaves
from elastic_ckpt.policy.retention import Retention

OnWarning = Literal["save", "stop", "ignore"]


@dataclass(frozen=True)
class MirrorSettings:
    """What a run copies to a bucket.

    Attributes:
        is_place: the bucket is the job's place, and the directory only this machine's copy of it.
        every: seconds between two copies at least.
        rate: bytes per second at most; 0 for no limit.
    """

    url: str
    every: float = 0.0
    rate: float = 0.0
    is_place: bool = False


@dataclass(frozen=True)
class RunSettings:
    """The settings of one ``elastic-ckpt run``.

    Attributes:
        module: the name under which ``script`` runs, as with ``python -m``; empty for a script.
        nproc: workers on this node.
        start_from: name of the checkpoint to go back to; empty for the newest.
        grace: seconds from a notice to the end of the node, if the notice has no deadline.
        interval: overrides the script's save interval unless empty.
        mtbf: expected seconds between failures, for an automatic interval.
        max_failures: consecutive failures to retry without a new checkpoint between them.
        hang_seconds: minimum silence of all ranks that counts as a hang.
        python: path of the workers' interpreter; empty for the supervisor's own.
        global_batch: samples per optimizer step over all ranks; 0 leaves it to the script.
        preload: modules to import before workers start.
        retention: overrides the script's retention unless empty.
        group_access: let the group read the job directory.
        memory: directory of the memory tier; None for none.
        replicas: how many other nodes keep a copy of what a node has in memory.
        domain: what fails together with this node: a zone, a rack, a switch.
        nodes: minimum and maximum number of nodes of an incarnation.
        endpoint: HOST:PORT where the nodes meet; empty for a single node.
        started_others: this command starts the other nodes, and a signal to it is for all.
        gather_seconds: how long to wait for the minimum number of nodes, or for the head.
        notice_sources: sources of notices in addition to signals.
        notice_file: a file or FIFO to read notices from.
        acknowledge: tell the platform not to wait once the checkpoint is sealed.
        mirror: copies in a bucket; None for none.
        metrics: host and port to serve Prometheus metrics on; port 0 picks a free one.
        web: host and port to serve the live page on; port 0 picks a free one, None for none.
        digests: steps between two digests of each rank's state in the journal; 0 for none.
        own: the checkpoints that the script writes itself.
        env: variables of the workers, in place of those of the same names in the environment.
        metrics_file: file to write the metrics to, for node_exporter.
    """

    directory: Path
    script: Path
    args: tuple[str, ...]
    name: str
    node: str
    module: str = ""
    nproc: int = 1
    start_from: str = ""
    grace: float = 30.0
    interval: SaveInterval = field(default_factory=SaveInterval)
    mtbf: float = DEFAULT_MTBF_SECONDS
    max_failures: int = 3
    hang_seconds: float = MIN_HANG_SECONDS
    python: str = ""
    global_batch: int = 0
    preload: tuple[str, ...] = ()
    retention: Retention = field(default_factory=Retention)
    group_access: bool = False
    memory: Path | None = None
    replicas: int = 1
    domain: str = ""
    nodes: tuple[int, int] = (1, 1)
    endpoint: str = ""
    started_others: bool = False
    gather_seconds: float = 600.0
    notice_sources: tuple[str, ...] = ()
    notice_file: Path | None = None
    on_warning: OnWarning = "save"
    acknowledge: bool = False
    mirror: MirrorSettings | None = None
    metrics: tuple[str, int] | None = None
    metrics_file: Path | None = None
    web: tuple[str, int] | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    digests: int = 0
    own: OwnSaves = field(default_factory=OwnSaves)

    @property
    def own_bucket(self) -> str:
        """The bucket that is this node's place of the job, behind its disk; else empty."""
        is_place = self.mirror is not None and self.mirror.is_place and not self.endpoint
        return self.mirror.url if self.mirror is not None and is_place else ""

    @property
    def shared_url(self) -> str:
        """The bucket that several nodes save to, which share no directory; else empty."""
        is_shared = self.mirror is not None and self.mirror.is_place and bool(self.endpoint)
        return self.mirror.url if self.mirror is not None and is_shared else ""

    @property
    def terms(self) -> dict[str, str]:
        """The settings that must be the same on all nodes, by option."""
        return {
            "the script": self.module or self.script.name,
            "the script's arguments": " ".join(self.args),
            "--dir": self.shared_url,
            "--save-interval": f"{self.interval.worker_interval} steps",
            "--global-batch": str(self.global_batch),
            "--memory-dir": "off" if self.memory is None else "on",
            "--replicas": str(self.replicas),
            "--digests": str(self.digests),
            "--watch, --resume-args and their like": repr(self.own),
            "--keep-last, --keep-every or --keep-best": repr(self.retention),
        }


def reload(old: RunSettings, new: RunSettings) -> tuple[RunSettings, str]:
    """Take over the save interval and the action on a warning, and return what changed in words;
    the rest waits for the next start. UsageError if the new interval needs a restart of all
    nodes."""
    taken = replace(old, interval=new.interval, mtbf=new.mtbf, on_warning=new.on_warning)
    if old.endpoint and new.interval.worker_interval != old.interval.worker_interval:
        raise UsageError("a new interval in steps requires a restart of all nodes")
    later = "" if new == taken else "; other changes apply at the next start"
    said = f"save interval {taken.interval}, on a warning {taken.on_warning}{later}"
    return taken, said
