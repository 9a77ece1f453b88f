"""SLURM: the job's time limit, and the deadline after a SIGTERM.

A preempted job stays RUNNING, gets a PreemptTime, and its EndTime becomes the end of the grace
period. A job that is cancelled, requeued or over its limit is COMPLETING, and is killed KillWait
after its SIGTERM. Fields and times are those of SLURM 22.05.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from typing import Final

from elastic_ckpt.notices import SourceEvent
from elastic_ckpt.notices.polling import PollingSource
from elastic_ckpt.policy.deadline import Notice, TimeLimit

log = logging.getLogger(__name__)

TIMEOUT_SECONDS: Final = 10.0
KILL_WAIT_SECONDS: Final = 30.0
"""SLURM's default, if the configuration is unavailable."""

NEAR_SECONDS: Final = 900.0
"""A signal this long before the time limit is taken to announce it, as of sbatch --signal."""

_SELDOM_SECONDS: Final = 300.0
_OFTEN_SECONDS: Final = 15.0
_FIRST_PORT: Final = 29400
_PORTS: Final = 1000


class SlurmUnanswered(Exception):
    """scontrol is missing, or the controller does not answer."""


class SlurmSource(PollingSource):
    """Polls the controller rarely, and immediately after a signal."""

    name = "slurm"
    interval_seconds = _SELDOM_SECONDS

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        super().__init__()
        self._job = job_id(environ)
        self._signalled = 0.0

    def poll_now(self) -> None:
        """Find out why a signal arrived: preempted, cancelled, or over the limit."""
        if not self._signalled:
            self._signalled = time.monotonic()
        super().poll_now()

    def poll(self) -> Iterator[tuple[object, SourceEvent]]:
        signalled = self._signalled
        try:
            job = show_job(self._job)
        except SlurmUnanswered:
            if not signalled:
                raise
            why = "SIGTERM, and the controller does not answer"
            yield "unanswered", Notice(self.name, why, signalled + KILL_WAIT_SECONDS)
            return
        now, wall = time.monotonic(), time.time()
        end = _time(job, "EndTime")
        preempted = _time(job, "PreemptTime")
        if preempted and job.get("JobState") == "RUNNING":
            grace = end - preempted if end else grace_seconds(job.get("Partition", ""))
            # Both times are on the controller's clock; this node's may differ.
            yield "preempted", Notice(self.name, "preempted", (signalled or now) + grace)
        elif signalled and job.get("JobState") != "RUNNING":
            what = "time limit" if job.get("Reason") == "TimeLimit" else "cancelled or requeued"
            yield "ends", Notice(self.name, what, signalled + kill_wait_seconds())
        elif signalled and _limited(job, end) and 0 < end - wall <= NEAR_SECONDS:
            why = "signal before the time limit"
            yield ("near", end), Notice(self.name, why, now + end - wall)
        elif _limited(job, end):
            # The limit may be extended: poll more often as it approaches.
            self.interval_seconds = min(_SELDOM_SECONDS, max(_OFTEN_SECONDS, (end - wall) / 4))
            yield ("limit", end), TimeLimit(self.name, "time limit", now + end - wall)


def job_id(environ: Mapping[str, str] = os.environ) -> str:
    """Return the ID of this job, or of this task of a job array; empty outside SLURM.

    One task of an array has the array's own ID as its SLURM_JOB_ID; requeueing that would requeue
    all tasks.
    """
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID", "")


def signal_grace() -> float | None:
    """Return the maximum seconds between SIGTERM and SIGKILL; None if SLURM does not answer.

    After a SIGTERM, :class:`SlurmSource` finds out whether it was a preemption or a cancellation.
    """
    try:
        partition = os.environ.get("SLURM_JOB_PARTITION", "")
        return max(grace_seconds(partition) if partition else 0.0, kill_wait_seconds())
    except SlurmUnanswered:
        return None


def show_job(job: str) -> dict[str, str]:
    """Return the fields of ``scontrol show job``, times in seconds since the epoch."""
    return fields(scontrol("-o", "show", "job", job))


def grace_seconds(partition: str) -> float:
    """Return a partition's GraceTime."""
    return _number(fields(scontrol("-o", "show", "partition", partition)).get("GraceTime"), 0.0)


def kill_wait_seconds() -> float:
    """Return the seconds from SIGTERM to SIGKILL of a job without a grace period."""
    return _number(show_config().get("KillWait"), KILL_WAIT_SECONDS)


def requeue_exit_codes() -> set[int]:
    """Return the exit codes after which SLURM requeues a job by itself."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", show_config().get("RequeueExit", "")):
        found.update(range(int(first), int(last or first) + 1))
    return found


def head_endpoint() -> str:
    """Return the rendezvous endpoint of a step: the address of its first node, and a port.

    Empty outside a SLURM job. Without scontrol, as in a container, it is the first node's name.
    """
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    number = os.environ.get("SLURM_JOB_ID", "")
    if not nodes or not number.isdecimal():
        return ""
    address = first_host(nodes)
    try:
        address = fields(scontrol("-o", "show", "node", address)).get("NodeAddr") or address
    except SlurmUnanswered as error:
        log.info("the address of %s is its name: %s", address, error)
    return f"{address}:{_FIRST_PORT + int(number) % _PORTS}"


def first_host(nodes: str) -> str:
    """Return the first of a list of nodes: ``n007`` of ``n[007-009,12],m1``."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def tasks_per_node(environ: Mapping[str, str] = os.environ) -> int:
    """Return the maximum number of tasks that srun started per node; 1 outside a step.

    SLURM writes ``2(x3),1`` for 2 tasks on each of three nodes, and 1 on another.
    """
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return max(map(int, counts), default=1)


def show_config() -> dict[str, str]:
    """Return the controller's configuration."""
    lines = scontrol("show", "config").splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def scontrol(*arguments: str) -> str:
    """Return what scontrol prints.

    Raises:
        SlurmUnanswered: scontrol failed; with its error output.
    """
    environ = os.environ | {"SLURM_TIME_FORMAT": "%s"}
    try:
        done = subprocess.run(
            ["scontrol", *arguments],
            capture_output=True, text=True, errors="replace", env=environ,
            stdin=subprocess.DEVNULL, timeout=TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmUnanswered(f"scontrol: {error}") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split())
        raise SlurmUnanswered(said or f"scontrol exited with {done.returncode}")
    return done.stdout


def fields(line: str) -> dict[str, str]:
    """Parse ``Name=value`` pairs; a value ends where the next name starts."""
    found = re.split(r"(?:^|\s)([A-Za-z][A-Za-z:/]*)=", line.strip())[1:]
    return dict(zip(found[::2], (value.strip() for value in found[1::2]), strict=True))


def _limited(job: Mapping[str, str], end: float) -> bool:
    return bool(end) and job.get("TimeLimit") != "UNLIMITED"


def _time(job: Mapping[str, str], name: str) -> float:
    """Return seconds since the epoch; 0 for None and Unknown."""
    return _number(job.get(name), 0.0)


def _number(text: str | None, otherwise: float) -> float:
    """Parse ``30 sec`` as 30."""
    match = re.match(r"\d+", text or "")
    return float(match[0]) if match else otherwise
