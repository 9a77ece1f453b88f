"""All metrics: name, meaning, labels.

Names and units follow Prometheus's conventions: seconds and bytes, ``_total`` for counters, moments
as seconds since the epoch. Prometheus sets the labels ``job`` and ``instance`` itself, so the job's
name is ``job_name``. Every metric has it, because a node may collect the files of several jobs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Kind(str, Enum):
    """The type of a metric, as in the format's ``# TYPE`` lines."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"
    INFO = "info"


@dataclass(frozen=True)
class Metric:
    """One metric, with ``labels`` in addition to ``job_name``. If it is ``of_job``, only the
    leading node has it; otherwise each node."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    of_job: bool = True


def _node(name: str, text: str, *labels: str, kind: Kind = Kind.GAUGE) -> Metric:
    return Metric(f"elastic_ckpt_{name}", kind, text, labels, of_job=False)


def _job(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"elastic_ckpt_{name}", Kind.GAUGE, text, labels)


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"elastic_ckpt_{name}", Kind.COUNTER, text, labels)


def _durations(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"elastic_ckpt_{name}", Kind.HISTOGRAM, text, labels)


INFO: Final = _node(
    "info", "1: which run of which version this is", "node_name", "run_id", "version",
    kind=Kind.INFO,
)  # fmt: skip
WRITTEN: Final = _node("written_timestamp_seconds", "When these values were collected")
STARTED: Final = _node("start_time_seconds", "When this supervisor started")
STATE: Final = _node("state", "1 for what the supervisor is doing, 0 for the other states", "state")
DEADLINE: Final = _node(
    "notice_deadline_timestamp_seconds", "When this node goes away; absent without a notice"
)
STEP_SECONDS: Final = _node(
    "worker_step_seconds", "Duration of a step of this rank, a moving average", "rank"
)
BUSY_SECONDS: Final = _node(
    "worker_busy_seconds",
    "The rank's own work in a step; for the rest it waits for other ranks",
    "rank",
)
MEMORY: Final = _node("worker_resident_memory_bytes", "Resident memory of the rank", "rank")
BEAT: Final = _node(
    "worker_last_beat_timestamp_seconds", "When the rank sent its last heartbeat", "rank"
)

INCARNATION: Final = _job("incarnation", "Launches of all workers, over all runs")
NODES: Final = _job("nodes", "Nodes that take part")
STEP: Final = _job("step", "Optimizer steps finished, by the slowest rank", "session")
FINAL_STEP: Final = _job("final_step", "Optimizer steps of the whole training", "session")
EPOCH: Final = _job("epoch", "The current epoch", "session")
EPOCH_SAMPLES: Final = _job("epoch_samples", "Samples of this epoch used so far", "session")
STEP_SAMPLES: Final = _job("step_samples", "Samples of one step, all ranks together", "session")
REPORTED: Final = _job("reported", "Metrics that the script reports, by name", "session", "metric")
FAILURES_LEFT: Final = _job("failures_left", "Failures that will still be retried")

TIME: Final = _job("time_seconds", "Seconds since the job's first start, by category", "category")
GOODPUT: Final = _job("goodput_ratio", "Training that still counts over all time")
RESTARTS: Final = _counter("restarts_total", "Launches after the first one, by cause", "cause")
CRASHES: Final = _counter("crashes_total", "Incarnations that failed, by class", "kind")
SAVES: Final = _counter("saves_total", "Checkpoints sealed", "reason", "tier")
SAVE_FAILURES: Final = _counter("save_failures_total", "Saves that failed")
SAVE_DURATION: Final = _durations(
    "save_duration_seconds", "From the start of a save to its seal", "tier"
)
STALL: Final = _counter("save_stall_seconds_total", "Seconds that training stalled for saves")
DRAIN_DURATION: Final = _durations("drain_duration_seconds", "Copying from memory to the disk")
DRAIN_FAILURES: Final = _counter(
    "drain_failures_total", "Failed attempts to copy a checkpoint from memory to the disk"
)
CHECKPOINT_STEP: Final = _job("checkpoint_step", "Step of the newest checkpoint", "session", "tier")
CHECKPOINT_TIME: Final = _job(
    "checkpoint_timestamp_seconds", "When the newest checkpoint was sealed", "session", "tier"
)
CHECKPOINT_BYTES: Final = _job(
    "checkpoint_bytes", "Size of the newest checkpoint", "session", "tier"
)
QUARANTINED: Final = _counter("quarantined_checkpoints_total", "Checkpoints set aside")
RECOVERY: Final = _job(
    "last_recovery_duration_seconds",
    "The last recovery, from the failure to the end of the next step, by stage",
    "stage",
)

METRICS: Final = tuple(found for found in list(globals().values()) if isinstance(found, Metric))
"""In the order in which they are shown."""
