"""The content of ``status``, gathered from records, boards, journal and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from elastic_ckpt.checkpoint.catalog import CheckpointView, newest_and_rejected, newest_of_job
from elastic_ckpt.checkpoint.quarantine import is_scripts
from elastic_ckpt.cli.common import read_slots
from elastic_ckpt.cli.leftovers import LeftoverView, view_leftovers
from elastic_ckpt.cli.slurm.queue import SlurmView, not_begun
from elastic_ckpt.cli.status import progress as work
from elastic_ckpt.cli.status.advice import FIX_STORAGE, Situation, advise
from elastic_ckpt.cli.status.disk import filling
from elastic_ckpt.cli.status.moved import of_this_directory
from elastic_ckpt.cli.status.nodes import (
    LeftOutView,
    NodeView,
    left_out_views,
    node_views,
    shown_record,
)
from elastic_ckpt.cli.status.problems import (
    Observed,
    ProblemView,
    exit_code,
    is_silent,
    problems,
)
from elastic_ckpt.cli.status.progress import AtRiskView, ProgressView, at_risk, progress
from elastic_ckpt.cli.status.run import (
    NoticeView,
    SupervisorView,
    notice_view,
    state_of,
    supervisor_view,
    unsupervised,
)
from elastic_ckpt.cli.status.saves import (
    AuditView,
    EmergencySaveView,
    InterruptionView,
    LastSaveView,
    last_audit,
    last_emergency_save,
    last_interruption,
    last_save,
)
from elastic_ckpt.cli.status.workers import WorkerView, reported, worker_views
from elastic_ckpt.jobdir.heartbeat import Heartbeat, read_heartbeat
from elastic_ckpt.jobdir.node_record import (
    FailureRecord,
    NodeRecord,
    RecoveryRecord,
    job_records,
)
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.worker_logs import log_files
from elastic_ckpt.journal.history import History
from elastic_ckpt.journal.history_types import Cause
from elastic_ckpt.journal.journal import read_journal
from elastic_ckpt.journal.time_account import Goodput
from elastic_ckpt.policy.accumulation import step_size_changed
from elastic_ckpt.policy.failure import FailureClass
from elastic_ckpt.policy.interval import OptimalInterval
from elastic_ckpt.protocol.run_state import TERMINAL
from elastic_ckpt.protocol.slot import Slot
from elastic_ckpt.util.text import encodable, printable


class PositionView(msgspec.Struct):
    """The position of the job in its data."""

    epoch: int
    step: int
    sample_start_index: int


class NewestView(msgspec.Struct):
    """A checkpoint; ``verified`` if every byte of it was once read back and matched."""

    step: int
    path: str
    tier: str
    bytes: int
    age_seconds: float | None
    reason: str
    verified: bool


class RejectedView(msgspec.Struct):
    """A checkpoint that a restart would not take, and why."""

    path: str
    reason: str


class RestartsView(msgspec.Struct):
    """Counts over all runs; ``failures_left`` is the budget of this run."""

    failures: int
    preemptions: int
    failures_left: int


class StatusView(msgspec.Struct, kw_only=True):
    """Everything that ``status --json`` prints. Times are seconds, sizes bytes.

    Attributes:
        state: a ``RunState``; ``queued`` if SLURM has not started the job yet; ``dead`` if the
            supervisor was killed; or ``unknown``.
        message: one line about the state.
        session: the Session that is open, or was last; empty for the unnamed one.
        advice: what to do now; empty for nothing.
        commands: what to type for it in a shell, in this order.
        warnings: what is wrong; a running job with a warning is degraded.
        problems: the same and what is wrong besides, the most urgent first, each with its command.
        exit_code: of ``status``: 0 healthy, finished or queued in SLURM, 1 degraded or waiting to
            be restarted, 2 dead.
        at_risk: None unless the job is training.
        newest_on_disk: what remains if the node is lost.
        left_out: nodes that the job leaves out.
        memory_only: what jobs that no longer run left in this machine's memory, and no disk has.
        step_size: what changed in the samples of a step with the number of workers; else empty.
        reported: the metrics that the script reported, by name.
        goodput: share of the time that was training which still counts.
        time: where the time went.
        mirror: how the copies in a bucket are; empty without any.
        slurm: what SLURM says, which is asked unless the job runs; None if it knows of no job.
    """

    job: str
    state: str
    message: str
    session: str
    advice: str
    commands: tuple[str, ...]
    warnings: list[str]
    problems: list[ProblemView]
    exit_code: int
    supervisor: SupervisorView | None
    incarnation: int
    nodes: list[NodeView]
    left_out: list[LeftOutView]
    workers: list[WorkerView]
    position: PositionView | None
    progress: ProgressView | None
    step_size: str
    reported: dict[str, float]
    at_risk: AtRiskView | None
    newest_intact: NewestView | None
    newest_on_disk: NewestView | None
    memory_only: list[LeftoverView]
    rejected: list[RejectedView]
    notice: NoticeView | None
    last_interruption: InterruptionView | None
    last_save: LastSaveView | None
    last_recovery: RecoveryRecord | None
    last_failure: FailureRecord | None
    last_emergency_save: EmergencySaveView | None
    last_audit: AuditView | None
    save_interval: OptimalInterval | None
    restarts: RestartsView
    goodput: float | None
    lost_work_seconds: float
    time: Goodput
    mirror: str
    slurm: SlurmView | None = None

    @property
    def is_stuck(self) -> bool:
        """Whether a restart would end with 65. Without one of its own a script starts at step 0."""
        unusable = (one for one in self.rejected if not is_scripts(Path(one.path)))
        return self.newest_intact is None and any(unusable)


AskSlurm = Callable[[str], SlurmView | None]
"""Asks SLURM about a job; with the number of the one that ran last, or an empty one."""


def gather(
    job: JobDirectory,
    history: History | None = None,
    ask_slurm: AskSlurm = lambda number: None,
) -> StatusView:
    """Gather everything; works with the supervisor alive, dead or never started.

    Args:
        history: what the job's journal holds, if it was read already.
        ask_slurm: called unless the job runs.
    """
    records = job_records(job)
    record, where = of_this_directory(job, _with_last_lines(job, shown_record(records)))
    alive = record.owner.is_alive() if record and not where.run_is_elsewhere else False
    here = record is not None and not where.run_is_elsewhere
    run = [one for one in records if here and record and one.run_id == record.run_id]
    boards = [(one.node, read_slots(one)) for one in run if _takes_part(one, record)]
    slots = [slot for _, found in boards for slot in found]
    newest: CheckpointView | None = None
    passed_over: list[CheckpointView] = []
    if record is not None or job.root.exists():  # SLURM may not have begun the job
        newest, passed_over = newest_and_rejected(job, record.memory if record else "")
    on_disk = newest if newest is None or newest.tier != "memory" else newest_of_job(job)
    session = next((slot.session for slot in slots), newest.session if newest else "")
    if history is None:
        history = History.of(read_journal(job, marks=False))
    account = history.account
    running = alive is not False and record is not None and record.state not in TERMINAL
    now = time.time() if running else None
    goodput = account.goodput(now)
    beat = read_heartbeat(job, record.node) if record else None
    if record is not None:
        state, message = state_of(record, alive, beat, where)
    else:
        state, message = unsupervised(job, newest)
    slurm = None
    if state in ("unknown", "dead") or (record is not None and record.state in TERMINAL):
        slurm = ask_slurm(record.command.slurm_job if record and record.command else "")
    if slurm is not None and state == "unknown":
        state, message = not_begun(slurm)
    newest_save = last_save(history)
    if newest is None and passed_over:
        message = message.partition(FIX_STORAGE)[0]  # there is no older one to resume from
    rejected = [RejectedView(encodable(str(view.path)), view.why) for view in passed_over]
    position = _position(slots, beat if running and alive is None else None, newest)
    left_out = left_out_views(job, record, run)
    workers = worker_views(boards)
    step_size, audit = _step_size(slots), last_audit(history, time.time())
    done = progress(position.step if position else None, slots, history.marks, running=running)
    found = problems(
        job,
        Observed(
            running, record, slots, workers, newest, passed_over, newest_save, audit, left_out,
            filling(job, on_disk, now) if now is not None else None,
            done.seconds_to_end if done else None,
            alive is None and is_silent(beat), time.time(),
        ),
    )  # fmt: skip
    copied, copied_at = work.copied_share(job, record, session)
    warnings = [one.warning for one in found if one.warning]
    save_error = newest_save.error if newest_save else ""
    unusable = any(not one.is_scripts for one in passed_over)
    situation = Situation(state, record, newest, unusable, save_error, slurm)
    advice = where.advice(advise(job, situation), state)
    return StatusView(
        job=record.job if record else printable(job.root.name),
        state=state,
        message=message,
        session=session,
        advice=advice.text,
        commands=advice.commands,
        warnings=warnings,
        problems=[one.view for one in found],
        exit_code=min(exit_code(state, warnings), 1 if slurm is not None and slurm.has_it else 2),
        supervisor=supervisor_view(record, alive, beat),
        incarnation=record.incarnation if record else 0,
        nodes=node_views(record, run),
        left_out=left_out,
        workers=workers,
        position=position,
        progress=done,
        step_size=step_size,
        reported=reported(slots),
        at_risk=at_risk(
            position.epoch,
            position.step,
            on_disk if on_disk and on_disk.session == session else None,
            account,
            now,
            copied=history.copies.newest or copied,
            copied_at=copied_at,
            stepless_since=record.stepless_since if record else 0.0,
        )
        if position and slots and now is not None
        else work.at_risk_of_own(record, on_disk, account, now),
        newest_intact=_newest(newest),
        newest_on_disk=_newest(on_disk),
        memory_only=view_leftovers(records),
        rejected=rejected,
        notice=notice_view(record) if running else None,
        last_interruption=last_interruption(history, time.time()),
        last_save=newest_save,
        last_recovery=record.last_recovery if record else None,
        last_failure=record.last_failure if record else None,
        last_emergency_save=last_emergency_save(history),
        last_audit=audit,
        save_interval=record.save_interval if record else None,
        restarts=RestartsView(
            max(record.failures if record else 0, _crashes(history)),
            record.preemptions if record else 0,
            record.failures_left if record else 0,
        ),
        goodput=goodput.fraction,
        lost_work_seconds=goodput.lost_work_seconds,
        time=goodput,
        mirror=record.mirror if record else "",
        slurm=slurm,
    )


def _with_last_lines(job: JobDirectory, record: NodeRecord | None) -> NodeRecord | None:
    """Return the record with what the rank that hung printed last, if another node had it."""
    last = record.last_failure if record is not None else None
    if record is None or last is None or last.tail or last.kind != FailureClass.HANG.value:
        return record
    found = (one for one in log_files(job) if one.incarnation == record.incarnation)
    tail = next((one.tail() for one in found if one.rank == last.rank), ())
    return replace(record, last_failure=replace(last, tail=tail))


def _step_size(slots: list[Slot]) -> str:
    changed = (step_size_changed(one.samples_before, one.samples_per_step) for one in slots)
    return next(filter(None, changed), "")


def _crashes(history: History) -> int:
    """Return the number of failures in all runs of the job; a record has those of the last."""
    crashes = [one for one in history.interruptions if one.cause is Cause.FAILURE]
    return sum(one.kind != FailureClass.MEMBERSHIP.value for one in crashes)


def _takes_part(member: NodeRecord, head: NodeRecord | None) -> bool:
    """Return whether a node's board belongs to the head's incarnation."""
    same = head is not None and member.incarnation == head.incarnation
    return same and member.state not in TERMINAL and bool(member.owner.is_alive())


def _position(
    slots: list[Slot], beat: Heartbeat | None, newest: CheckpointView | None
) -> PositionView | None:
    attached = [slot for slot in slots if slot.attached]
    if attached:
        last = min(attached, key=lambda slot: slot.finished)
        return PositionView(last.epoch, last.shown_step, last.sample_start_index)
    if beat is not None and beat.step:
        return PositionView(beat.epoch, beat.step, beat.sample_start_index)
    if newest is not None and newest.manifest is not None:
        found = newest.manifest
        return PositionView(found.epoch, found.step, found.sample_start_index)
    return None


def _newest(view: CheckpointView | None) -> NewestView | None:
    if view is None or view.seal is None:
        return None
    seal = view.seal
    return NewestView(
        view.step,
        encodable(view.url or str(view.path)),
        view.tier,
        seal.total_bytes,
        view.age_seconds,
        seal.reason,
        view.verified,
    )
