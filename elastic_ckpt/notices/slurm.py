"""SLURM: the job's time limit, and how long a SIGTERM leaves.

A preempted job keeps the state RUNNING, gets a PreemptTime, and its EndTime becomes the end of the
grace; one that is cancelled, requeued or over its limit is COMPLETING, and is killed KillWait after
its SIGTERM. Fields and times are those of SLURM 22.05.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from typing import Final

from elastic_ckpt.notices import SourceEvent
from elastic_ckpt.notices.polling import PollingSource
from elastic_ckpt.policy.deadline import Notice, TimeLimit

TIMEOUT_SECONDS: Final = 10.0
KILL_WAIT_SECONDS: Final = 30.0
"""SLURM's default, where nobody says."""


_SELDOM_SECONDS: Final = 300.0
_OFTEN_SECONDS: Final = 15.0
_FIRST_PORT: Final = 29400
_PORTS: Final = 1000


class SlurmUnanswered(Exception):
    """scontrol is not there, or its controller does not answer."""


class SlurmSource(PollingSource):
    """Asks the controller seldom, and at once when a signal has come."""

    name = "slurm"
    interval_seconds = _SELDOM_SECONDS

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        super().__init__()
        self._job = job_id(environ)
        self._signalled = 0.0

    def poll_now(self) -> None:
        """A signal came: preempted, cancelled, or over the limit?"""
        if not self._signalled:
            self._signalled = time.monotonic()
        super().poll_now()

    def ask(self) -> Iterator[tuple[object, SourceEvent]]:
        """The job's end; after a signal the time that it leaves."""
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
            # The controller's clock says both; this node's may be another one.
            yield "preempted", Notice(self.name, "preempted", (signalled or now) + grace)
        elif signalled and job.get("JobState") != "RUNNING":
            what = "time limit" if job.get("Reason") == "TimeLimit" else "cancelled or requeued"
            yield "ends", Notice(self.name, what, signalled + kill_wait_seconds())
        elif end and job.get("TimeLimit") != "UNLIMITED":
            # It may be moved: look more often as it comes near.
            self.interval_seconds = min(_SELDOM_SECONDS, max(_OFTEN_SECONDS, (end - wall) / 4))
            yield ("limit", end), TimeLimit(self.name, "time limit", now + end - wall)


def job_id(environ: Mapping[str, str] = os.environ) -> str:
    """What names this job, and of an array this task alone; empty outside SLURM.

    One task of an array bears the array's own number: to requeue that would requeue all of them.
    """
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID", "")


def signal_grace() -> float | None:
    """Seconds that a SIGTERM leaves at the most; None if SLURM does not say.

    Which of the two it is, a preemption's or a cancellation's, :class:`SlurmSource` finds out then.
    """
    try:
        partition = os.environ.get("SLURM_JOB_PARTITION", "")
        return max(grace_seconds(partition) if partition else 0.0, kill_wait_seconds())
    except SlurmUnanswered:
        return None


def show_job(job: str) -> dict[str, str]:
    """The fields of ``scontrol show job``, times in seconds since the epoch."""
    return fields(scontrol("-o", "show", "job", job))


def grace_seconds(partition: str) -> float:
    """A partition's GraceTime."""
    return _number(fields(scontrol("-o", "show", "partition", partition)).get("GraceTime"), 0.0)


def kill_wait_seconds() -> float:
    """From SIGTERM to SIGKILL where there is no grace."""
    return _number(show_config().get("KillWait"), KILL_WAIT_SECONDS)


def requeue_exit_codes() -> set[int]:
    """Exit codes on which SLURM queues a job again by itself."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", show_config().get("RequeueExit", "")):
        found.update(range(int(first), int(last or first) + 1))
    return found


def head_endpoint() -> str:
    """Where a step's nodes meet: the address of its first one, and a port of this job's.

    Empty outside a job of several nodes, or if SLURM does not say.
    """
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    number = os.environ.get("SLURM_JOB_ID", "")
    if not nodes or not number.isdecimal():
        return ""
    try:
        first = scontrol("show", "hostnames", nodes).split()[0]
        address = fields(scontrol("-o", "show", "node", first)).get("NodeAddr") or first
    except (SlurmUnanswered, IndexError):
        return ""
    return f"{address}:{_FIRST_PORT + int(number) % _PORTS}"


def show_config() -> dict[str, str]:
    """The controller's configuration."""
    lines = scontrol("show", "config").splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def scontrol(*arguments: str) -> str:
    """What scontrol prints.

    Raises:
        SlurmUnanswered: with what it says instead.
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
        raise SlurmUnanswered(said or f"scontrol ended with {done.returncode}")
    return done.stdout


def fields(line: str) -> dict[str, str]:
    """``Name=value`` pairs; a value ends where the next name begins."""
    found = re.split(r"(?:^|\s)([A-Za-z][A-Za-z:/]*)=", line.strip())[1:]
    return dict(zip(found[::2], (value.strip() for value in found[1::2]), strict=True))


def _time(job: Mapping[str, str], name: str) -> float:
    """Seconds since the epoch; 0 for None and Unknown."""
    return _number(job.get(name), 0.0)


def _number(text: str | None, otherwise: float) -> float:
    """``30 sec`` as 30."""
    match = re.match(r"\d+", text or "")
    return float(match[0]) if match else otherwise
