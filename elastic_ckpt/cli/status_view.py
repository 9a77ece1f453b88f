"""What ``status`` knows: gathered from records, board, journal and checkpoints; no printing."""

from __future__ import annotations

import time

import msgspec
import psutil

from elastic_ckpt.board import Board
from elastic_ckpt.cli.save_view import (
    EmergencySaveView,
    LastSaveView,
    SaveIntervalView,
    last_emergency_save,
    last_save,
    save_interval,
)
from elastic_ckpt.core.goodput import account
from elastic_ckpt.core.run_state import TERMINAL, RunState
from elastic_ckpt.core.straggler import stragglers
from elastic_ckpt.core.text import encodable, printable
from elastic_ckpt.errors import ElasticCkptError
from elastic_ckpt.slot import Slot
from elastic_ckpt.store.catalog import CheckpointView, newest_and_rejected
from elastic_ckpt.store.heartbeat import SILENT_SECONDS, Heartbeat, read_heartbeat
from elastic_ckpt.store.journal import read_journal
from elastic_ckpt.store.layout import JobDirectory
from elastic_ckpt.store.records import FailureRecord, NodeRecord, RecoveryRecord, job_records


class SupervisorView(msgspec.Struct):
    """Of the node that leads.

    Attributes:
        alive: None when it is on another host, and only its files can be looked at.
        since: when it started, seconds since the epoch.
        heard_seconds: since it last wrote that it lives; None if it never did.
    """

    pid: int
    alive: bool | None
    since: float
    host: str
    node: str
    heard_seconds: float | None = None


class NodeView(msgspec.Struct):
    """A node of several; ``alive`` as of a supervisor."""

    node: str
    host: str
    leads: bool
    state: str
    message: str
    alive: bool | None


class WorkerView(msgspec.Struct):
    """One rank as the board shows it.

    Attributes:
        step_seconds: a whole step, on average.
        busy_seconds: the rank's own work in it: what is left it waits for others.
        slow: how many times as long as the others' its own work takes, for a slow one.
    """

    rank: int
    local_rank: int
    node: str
    pid: int
    phase: str
    step: int
    last_beat_seconds: float | None
    rss_bytes: int | None
    cpu_percent: float | None
    gpu_bytes: int | None
    step_seconds: float | None
    busy_seconds: float | None
    slow: float | None


class PositionView(msgspec.Struct):
    """Where in the data the job is."""

    epoch: int
    step: int
    sample_start_index: int


class NewestView(msgspec.Struct):
    """The checkpoint that a restart would take."""

    step: int
    path: str
    tier: str
    bytes: int
    age_seconds: float | None
    reason: str


class RejectedView(msgspec.Struct):
    """A checkpoint that a restart would not take, and why."""

    path: str
    reason: str


class NoticeView(msgspec.Struct):
    """A notice that is being served."""

    source: str
    reason: str
    seconds_left: float


class RestartsView(msgspec.Struct):
    """Counts; preemptions never use up ``failures_left``."""

    failures: int
    preemptions: int
    failures_left: int


class StatusView(msgspec.Struct, kw_only=True):
    """Everything that ``status --json`` prints."""

    job: str
    state: str
    message: str
    exit_code: int
    supervisor: SupervisorView | None
    incarnation: int
    nodes: list[NodeView]
    workers: list[WorkerView]
    position: PositionView | None
    newest_valid: NewestView | None
    rejected: list[RejectedView]
    notice: NoticeView | None
    last_save: LastSaveView | None
    last_recovery: RecoveryRecord | None
    last_failure: FailureRecord | None
    last_emergency_save: EmergencySaveView | None
    save_interval: SaveIntervalView | None
    restarts: RestartsView
    goodput: float | None
    lost_work_seconds: float


def gather(job: JobDirectory) -> StatusView:
    """Look at everything there is; works with the supervisor alive, dead or never started."""
    records = job_records(job)
    record = next((one for one in records if one.leads), next(iter(records), None))
    alive = record.owner.is_alive() if record else False
    run = [one for one in records if record and one.run_id == record.run_id]
    boards = [(one.node, _slots(one)) for one in run if _takes_part(one, record)]
    slots = [slot for _, found in boards for slot in found]
    slow = _slow(slots)
    newest, passed_over = newest_and_rejected(job, record.memory if record else "")
    events = read_journal(job)
    running = alive is not False and record is not None and record.state not in TERMINAL
    goodput = account(events, time.time() if running else None)
    beat = read_heartbeat(job, record.node) if record else None
    state, message = _state(record, alive, beat)
    if (record is not None and record.sessionless) or _no_session(record, slots):
        message += "; the script makes no Session: there will be no checkpoints"
    newest_save = last_save(events)
    rejected = [RejectedView(encodable(str(view.path)), view.why) for view in passed_over]
    return StatusView(
        job=record.job if record else printable(job.root.name),
        state=state,
        message=message,
        exit_code=max(
            _exit_code(state, record, rejected, newest, newest_save),
            1 if running and alive is None and _is_silent(beat) else 0,
        ),
        supervisor=_supervisor(record, alive, beat),
        incarnation=record.incarnation if record else 0,
        nodes=_nodes(record, run),
        workers=sorted(
            (_worker(slot, node, slow) for node, found in boards for slot in found if slot.pid),
            key=lambda worker: worker.rank,
        ),
        position=_position(slots, beat if running and alive is None else None, newest),
        newest_valid=_newest(newest),
        rejected=rejected,
        notice=_notice(record) if running else None,
        last_save=newest_save,
        last_recovery=record.last_recovery if record else None,
        last_failure=record.last_failure if record else None,
        last_emergency_save=last_emergency_save(events),
        save_interval=save_interval(record),
        restarts=RestartsView(
            record.failures if record else 0,
            record.preemptions if record else 0,
            record.failures_left if record else 0,
        ),
        goodput=goodput.fraction,
        lost_work_seconds=goodput.lost_work_seconds,
    )


def _nodes(record: NodeRecord | None, run: list[NodeRecord]) -> list[NodeView]:
    """Those that the head sees, and those of its run that are on their way out; if it leads any."""
    if record is None or not record.present:
        return []
    shown = [one for one in run if one.node in record.present or one.owner.is_alive()]
    return [
        NodeView(
            one.node, one.owner.host, one.leads, one.state.value, one.message, one.owner.is_alive()
        )
        for one in sorted(shown, key=lambda one: (not one.leads, one.node))
    ]


def _supervisor(
    record: NodeRecord | None, alive: bool | None, beat: Heartbeat | None
) -> SupervisorView | None:
    if record is None:
        return None
    owner, heard = record.owner, beat.age_seconds if beat else None
    return SupervisorView(owner.pid, alive, record.since, owner.host, record.node, heard)


def _is_silent(beat: Heartbeat | None) -> bool:
    return beat is None or beat.age_seconds > SILENT_SECONDS


def _state(
    record: NodeRecord | None, alive: bool | None, beat: Heartbeat | None
) -> tuple[str, str]:
    if record is None:
        return "unknown", "no supervisor has run here"
    if record.state in TERMINAL:
        return record.state.value, record.message
    if alive is False:
        return "dead", f"the supervisor (pid {record.owner.pid}) was killed while it was " + (
            f"{record.state.value}: run it again to go on from the newest valid checkpoint"
        )
    if alive is None:
        heard = f"last heard {beat.age_seconds:.0f} s ago" if beat else "never heard"
        seen = f"seen from another host, by its files: {record.owner.host} was {heard}"
        gone = "; it may be gone" if _is_silent(beat) else ""
        return record.state.value, f"{record.message} ({seen}{gone})"
    return record.state.value, record.message


def _exit_code(
    state: str,
    record: NodeRecord | None,
    rejected: list[RejectedView],
    newest: CheckpointView | None,
    last_save: LastSaveView | None,
) -> int:
    """0 running well or finished, 1 degraded or waiting to be run again, 2 dead."""
    if state in ("dead", "unknown", RunState.FAILED.value):
        return 2
    if state == RunState.FINISHED.value:
        return 0
    if state in (RunState.STARTING.value, RunState.RUNNING.value):
        sessionless = record is not None and record.sessionless
        unsaved = last_save is not None and last_save.error
        return 1 if sessionless or unsaved or (rejected and newest is None) else 0
    return 1


def _takes_part(member: NodeRecord, head: NodeRecord | None) -> bool:
    """Whether what a node's board shows belongs to the incarnation of which the head speaks."""
    same = head is not None and member.incarnation == head.incarnation
    return same and member.state not in TERMINAL and bool(member.owner.is_alive())


def _slots(record: NodeRecord) -> list[Slot]:
    try:
        return Board.open(record.board, writable=False).read_slots()
    except (OSError, ValueError, TypeError, IndexError, ElasticCkptError):
        return []  # another user's job, or it has just ended


def _no_session(record: NodeRecord | None, slots: list[Slot]) -> bool:
    """A script that has been running for a while and has not made a Session."""
    if record is None or record.state is not RunState.STARTING or not slots:
        return False
    now = time.monotonic_ns()
    return all(slot.pid and not slot.attached and now - slot.beat > 60e9 for slot in slots)


def _slow(slots: list[Slot]) -> dict[int, float]:
    busy = {slot.rank: slot.busy_ns / 1e9 for slot in slots}
    return stragglers(busy, max((slot.step_ns for slot in slots), default=0) / 1e9)


def _worker(slot: Slot, node: str, slow: dict[int, float]) -> WorkerView:
    rss, cpu = _process(slot.pid)
    beat = (time.monotonic_ns() - slot.beat) / 1e9 if slot.beat else None
    return WorkerView(
        rank=slot.rank,
        local_rank=slot.local_rank,
        node=node,
        pid=slot.pid,
        phase=slot.phase.name.lower(),
        step=slot.finished,
        last_beat_seconds=beat,
        rss_bytes=rss,
        cpu_percent=cpu,
        gpu_bytes=None,
        step_seconds=slot.step_ns / 1e9 if slot.step_ns else None,
        busy_seconds=slot.busy_ns / 1e9 if slot.busy_ns else None,
        slow=slow.get(slot.rank),
    )


def _process(pid: int) -> tuple[int | None, float | None]:
    """Resident bytes, and CPU per cent of one core averaged over the process's life."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times = process.cpu_times()
            age = max(0.001, time.time() - process.create_time())
            return process.memory_info().rss, 100.0 * (times.user + times.system) / age
    except (psutil.Error, ValueError, OverflowError):
        return None, None


def _position(
    slots: list[Slot], beat: Heartbeat | None, newest: CheckpointView | None
) -> PositionView | None:
    attached = [slot for slot in slots if slot.attached]
    if attached:
        last = min(attached, key=lambda slot: slot.finished)
        return PositionView(last.epoch, last.finished, last.sample_start_index)
    if beat is not None and beat.step:
        return PositionView(beat.epoch, beat.step, beat.sample_start_index)
    if newest is not None and newest.manifest is not None:
        found = newest.manifest
        return PositionView(found.epoch, found.step, found.sample_start_index)
    return None


def _newest(view: CheckpointView | None) -> NewestView | None:
    if view is None or view.manifest is None:
        return None
    return NewestView(
        view.step,
        encodable(str(view.path)),
        view.tier,
        view.manifest.total_bytes,
        view.age_seconds,
        view.manifest.reason,
    )


def _notice(record: NodeRecord | None) -> NoticeView | None:
    if record is None or record.notice is None or not record.owner.is_local:
        return None
    left = max(0.0, record.notice.deadline - time.monotonic())
    return NoticeView(record.notice.source, record.notice.reason, left)
