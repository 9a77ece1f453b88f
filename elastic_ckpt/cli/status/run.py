"""The run in ``status``: its supervisor, its state and its notice."""

from __future__ import annotations

import time

import msgspec

from elastic_ckpt.checkpoint.catalog import CheckpointView
from elastic_ckpt.checkpoint.ownership.job_lock import read_owner
from elastic_ckpt.cli.status.moved import Moved
from elastic_ckpt.jobdir.heartbeat import Heartbeat
from elastic_ckpt.jobdir.node_record import NodeRecord
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.protocol.run_state import TERMINAL, RunState


class SupervisorView(msgspec.Struct):
    """The supervisor of the node that leads.

    Attributes:
        alive: None on another host, where only its files can be read.
        since: when it started, seconds since the epoch.
        last_beat_seconds: seconds since its last heartbeat; None before the first.
    """

    pid: int
    alive: bool | None
    since: float
    host: str
    node: str
    last_beat_seconds: float | None = None


class NoticeView(msgspec.Struct):
    """The notice that the job is saving for."""

    source: str
    reason: str
    seconds_left: float


def supervisor_view(
    record: NodeRecord | None, alive: bool | None, beat: Heartbeat | None
) -> SupervisorView | None:
    """Return the supervisor as its record and its heartbeat show it; None if none has run."""
    if record is None:
        return None
    owner, age = record.owner, beat.age_seconds if beat else None
    return SupervisorView(owner.pid, alive, record.since, owner.host, record.node, age)


def unsupervised(job: JobDirectory, newest: CheckpointView | None) -> tuple[str, str]:
    """Return the state of a job without a record, and a line on it: a script under torchrun holds
    the lock, or has made its last checkpoint."""
    found = read_owner(job.lock) if job.owns(job.control) else None
    if found is not None and found.owner.is_alive():
        owner = found.owner
        return "running", f"a script without a supervisor, pid {owner.pid} on {owner.host}"
    if newest is not None and newest.seal is not None and newest.seal.reason == "final":
        return RunState.FINISHED.value, "a script without a supervisor has finished"
    return "unknown", "no supervisor has run here"


def state_of(
    record: NodeRecord, alive: bool | None, beat: Heartbeat | None, where: Moved
) -> tuple[str, str]:
    """Return the state of a run, and a line on it."""
    if record.state in TERMINAL:
        return record.state.value, record.message
    if where.run_is_elsewhere:
        return "dead", where.message
    if alive is False:
        gone = f"the supervisor (pid {record.owner.pid}) was killed, or its disk failed,"
        return "dead", f"{gone} while it was {record.state.value}"
    if alive is None:
        last = f"{beat.age_seconds:.0f} s ago" if beat else "never"
        seen = f"seen from another host; last heartbeat of {record.owner.host}: {last}"
        return record.state.value, f"{record.message} ({seen})"
    return record.state.value, record.message


def notice_view(record: NodeRecord | None) -> NoticeView | None:
    """Return the notice that a run of this machine saves for; None without one."""
    if record is None or record.notice is None or not record.owner.is_local:
        return None
    left = max(0.0, record.notice.deadline - time.monotonic())
    return NoticeView(record.notice.source, record.notice.reason, left)
