"""What a run was asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from elastic_ckpt.errors import UsageError
from elastic_ckpt.policy.hang import MIN_HANG_SECONDS
from elastic_ckpt.policy.interval import DEFAULT_MTBF_SECONDS, SaveInterval
from elastic_ckpt.policy.retention import Retention

OnWarning = Literal["save", "stop", "ignore"]


@dataclass(frozen=True)
class RunSettings:
    """One ``elastic-ckpt run``.

    Attributes:
        directory: the job directory.
        script: the training script; ``args`` are its arguments.
        name: the job's identity, for people.
        node: this node's name.
        nproc: workers on this node.
        grace: seconds between a notice and the end of the node, where the notice does not say.
        interval: overrides the script's save interval; one that asks for nothing leaves it.
        mtbf: seconds between two failures that are expected beforehand; for an automatic interval.
        max_failures: failures in a row that are retried.
        hang_seconds: silence of all ranks that is taken for a hang at the least.
        global_batch: samples of one optimizer step, all ranks together; 0 leaves it to the script.
        preload: modules that workers find already imported.
        learn_preload: add those that the job was seen to import, and see what it imports.
        retention: which checkpoints are kept; one that asks for nothing leaves it to the script.
        group_access: let the group read the job directory.
        memory: where the memory tier is made, None for none.
        nodes: the fewest and the most nodes of an incarnation.
        endpoint: HOST:PORT where nodes meet; empty for one that is alone.
        gather_seconds: how long to wait for the fewest, or for the head, before it gives up.
        notice_sources: platforms whose word counts, beside signals.
        notice_file: a file or FIFO whose word counts, too.
        on_warning: what an early warning leads to.
        acknowledge: tell the platform once the job is sealed, so that it need not wait.
        metrics: host and port where Prometheus finds metrics; port 0 for any that is free.
        metrics_file: they are written to, too, for node_exporter.
    """

    directory: Path
    script: Path
    args: tuple[str, ...]
    name: str
    node: str
    nproc: int = 1
    grace: float = 30.0
    interval: SaveInterval = field(default_factory=SaveInterval)
    mtbf: float = DEFAULT_MTBF_SECONDS
    max_failures: int = 3
    hang_seconds: float = MIN_HANG_SECONDS
    global_batch: int = 0
    preload: tuple[str, ...] = ()
    learn_preload: bool = False
    retention: Retention = field(default_factory=Retention)
    group_access: bool = False
    memory: Path | None = None
    nodes: tuple[int, int] = (1, 1)
    endpoint: str = ""
    gather_seconds: float = 600.0
    notice_sources: tuple[str, ...] = ()
    notice_file: Path | None = None
    on_warning: OnWarning = "save"
    acknowledge: bool = False
    metrics: tuple[str, int] | None = None
    metrics_file: Path | None = None

    @property
    def terms(self) -> dict[str, str]:
        """What all nodes of a job must be told alike, by option: ranks act upon it together."""
        return {
            "the script": self.script.name,
            "the script's arguments": " ".join(self.args),
            "--save-interval": f"{self.interval.worker_interval} steps",
            "--global-batch": str(self.global_batch),
            "--keep-last, --keep-every or --keep-best": repr(self.retention),
        }


@dataclass(frozen=True)
class Reload:
    """
    Attributes:
        settings: from now on; another interval in steps takes a new incarnation.
        said: what changed, for people.
    """

    settings: RunSettings
    said: str


def reload(old: RunSettings, new: RunSettings) -> Reload:
    """The save interval and what a warning leads to; the rest counts from the next start.

    Raises:
        UsageError: it cannot be taken over now.
    """
    taken = replace(old, interval=new.interval, mtbf=new.mtbf, on_warning=new.on_warning)
    if old.endpoint and new.interval.worker_interval != old.interval.worker_interval:
        raise UsageError("a new interval in steps takes a new start of all nodes")
    later = "" if new == taken else "; what else differs counts from the next start"
    said = f"save interval {taken.interval}, on a warning {taken.on_warning}{later}"
    return Reload(taken, said)
