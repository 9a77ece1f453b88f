"""What is wrong with a job now, each with the command that fixes it, or that shows more."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from elastic_ckpt.checkpoint.catalog import CheckpointView, scan
from elastic_ckpt.cli.slurm.queue import QUEUED
from elastic_ckpt.cli.status.disk import Filling
from elastic_ckpt.cli.status.nodes import LeftOutView
from elastic_ckpt.cli.status.saves import AuditView, LastSaveView
from elastic_ckpt.cli.status.workers import WorkerView, silent_seconds
from elastic_ckpt.jobdir.heartbeat import SILENT_SECONDS, Heartbeat
from elastic_ckpt.jobdir.node_record import NodeRecord, OwnTrouble
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import command_line
from elastic_ckpt.policy.failure import FailureClass
from elastic_ckpt.policy.own_saves import NOT_SEALED
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.protocol.slot import Slot
from elastic_ckpt.protocol.stepless import CREATE_ONE, NO_SESSION, STEPLESS
from elastic_ckpt.util.units import human_bytes, human_duration

ALARM_SECONDS: Final = {"training": 30.0, "fetching": 120.0}
"""A shorter silence of all ranks in this phase is not a problem: file systems pause for long."""

KEPT_ON_A_FULL_DISK: Final = 2

ALARM_FULL_SECONDS: Final = 24 * 3600.0
"""A disk that will be full later than this is not a problem yet."""

ALARM_SLOWNESS: Final = 2.0
ALARM_SHARE: Final = 0.25
"""A rank is a problem if its own work takes this multiple of the others', and costs this share of
each step. What differs less is noise, or not worth a look."""

_MIRROR_TRIES: Final = 3  # fewer are a bucket's hiccup
_FAILING: Final = re.compile(r": failing for ([0-9]+) tries: ")
_FULL: Final = frozenset(map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))


class ProblemView(msgspec.Struct, frozen=True):
    """Something that is wrong, in one line, and the command for it; empty if none helps."""

    text: str
    command: str


class Problem(NamedTuple):
    """A problem, and what ``warnings`` says of it; empty if the job is not degraded by it."""

    text: str
    command: str = ""
    warning: str = ""

    @property
    def view(self) -> ProblemView:
        """As ``status --json`` prints it."""
        return ProblemView(self.text, self.command)


class Observed(NamedTuple):
    """What problems are found in.

    Attributes:
        running: the supervisor has not ended, as far as this machine knows.
        passed_over: what a restart would not load.
        filling: how the checkpoints fill the disk; None if they do not.
        seconds_to_end: until the training is done; None if unknown.
        is_silent: no heartbeat has come from a supervisor on another host.
        now: seconds since the epoch.
    """

    running: bool
    record: NodeRecord | None
    slots: Sequence[Slot]
    workers: Sequence[WorkerView]
    newest: CheckpointView | None
    passed_over: Sequence[CheckpointView]
    save: LastSaveView | None
    audit: AuditView | None
    left_out: Sequence[LeftOutView]
    filling: Filling | None
    seconds_to_end: float | None
    is_silent: bool
    now: float


def problems(job: JobDirectory, found: Observed) -> list[Problem]:
    """Return what is wrong, the most urgent first."""
    running = _of_run(job, found) if found.running else ()
    return [*_of_script(found), *running, *_aside(job, found), *_of_replay(job, found)]


def _of_script(found: Observed) -> Iterator[Problem]:
    if found.record is not None and _no_session(found.record, found):
        yield Problem(f"{NO_SESSION}: {CREATE_ONE}", "elastic-ckpt run --help", NO_SESSION)
    if found.record is not None and found.record.own_trouble is not None:
        text = _own_trouble(found.record.own_trouble, found.now if found.running else None)
        yield Problem(text, "elastic-ckpt run --help", text)
    if found.record is not None and found.record.stepless_since:
        text = _stepless(found.record, found.now if found.running else None)
        yield Problem(text, warning=text)


def _of_run(job: JobDirectory, found: Observed) -> Iterator[Problem]:
    for one in found.left_out:
        yield Problem(one.what, one.let_in, one.text)
    save = found.save
    if save is not None and save.error:
        text = f"the last save failed: {save.error}"
        yield Problem(text, save_command(job, save.error), text)
    yield from _of_disk(job, found)
    record = found.record
    if found.is_silent and record is not None:
        text = f"no heartbeat from the supervisor for {SILENT_SECONDS:.0f} s; it may be dead"
        line = record.command.line() if record.command else ""
        again = f": if {record.owner.host} is gone, rerun the same command" * bool(line)
        yield Problem(f"{text}{again}", line, text)
    yield from _of_ranks(job, found)
    if record is not None and _fails(record.mirror):
        where = record.bucket or job.root
        yield Problem(f"mirror {record.mirror}", command_line("doctor", where))


def _of_disk(job: JobDirectory, found: Observed) -> Iterator[Problem]:
    disk = found.filling
    end = ALARM_FULL_SECONDS if found.seconds_to_end is None else found.seconds_to_end
    if disk is None or disk.seconds > min(end, ALARM_FULL_SECONDS):
        return
    size, free = human_bytes(disk.checkpoint_bytes), human_bytes(disk.free)
    text = f"at this pace the disk is full in {human_duration(disk.seconds)}"
    why = f"a checkpoint takes {size} of the {free} left, and all are kept"
    todo = "remove old ones, and give the next run --keep-last"
    prune = command_line("prune", job.root, "--keep-last", KEPT_ON_A_FULL_DISK)
    yield Problem(f"{text}: {why}; {todo}", prune, text)


def _of_ranks(job: JobDirectory, found: Observed) -> Iterator[Problem]:
    record, workers = found.record, found.workers
    if record is None:
        return
    last, why = record.last_failure, command_line(*failure_command(record), job.root)
    if record.state is RunState.BACKING_OFF and last is not None:
        yield Problem(f"{who(last.rank)}{last.message}", why)
    elif record.failures and not record.failures_left and last is not None:
        text = "the failure budget is used up, so the next failure ends the job; the last one: "
        yield Problem(f"{text}{who(last.rank)}{last.message}", why)
    silent = silent_seconds(workers)
    late = min(workers, key=lambda one: (one.step, -(one.last_beat_seconds or 0.0)), default=None)
    if silent is not None and late is not None and silent > ALARM_SECONDS[late.phase]:
        usual, since = human_duration(late.step_seconds), human_duration(silent)
        behind = any(one.step > late.step for one in workers)
        how = "is behind" if behind else "has been silent the longest"
        text = f"no step for {since}, where one took {usual}: rank {late.rank} {how}, {late.phase}"
        yield Problem(text, command_line("logs", "--last", "--rank", late.rank, job.root), text)
    for one in workers:
        if one.slow is not None and one.slow >= ALARM_SLOWNESS and _lost_share(one) > ALARM_SHARE:
            text = f"rank {one.rank} is slow, and the others wait for it: its own work takes"
            shown = command_line("status", "-v", job.root)
            yield Problem(f"{text} {one.slow:.1f} x theirs", shown)


def _aside(job: JobDirectory, found: Observed) -> Iterator[Problem]:
    """Yield what damage a restart would meet. Once the job has saved past it, ``list`` has it;
    another program's directory is no damage."""
    newest, shown = found.newest, command_line("list", job.root)
    state = found.record.state if found.record is not None else None
    passed_over = [one for one in found.passed_over if not one.why.startswith(NOT_SEALED)]
    if passed_over and newest is None:
        text = "there are checkpoints, and none is intact: a restart has nothing to load"
        first = max(passed_over, key=lambda one: (one.epoch, one.step))
        why = f"; the newest, {first.title}: {first.why}"
        yield Problem(f"{text}{why}", shown, text if found.running else "")
    if newest is None:
        return
    if state is RunState.FINISHED:  # what was set aside did not keep it from its end
        passed_over = [one for one in passed_over if one.tier != "quarantine"]
    lost = [
        one
        for one in passed_over
        if not one.foreign and one.session == newest.session and _is_newer(one, newest)
    ]
    if lost:
        first = lost[0]
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        what = first.title if first.is_scripts else f"the checkpoint of {first.title}"
        text = f"{what} is damaged ({first.why}){more}"
        then = "the newest intact is" if state is RunState.FINISHED else "a restart resumes from"
        yield Problem(f"{text}: {then} {newest.title}", shown)


def _is_newer(one: CheckpointView, newest: CheckpointView) -> bool:
    if one.own is not None and newest.own is not None:
        return one.age > newest.age
    return (one.epoch, one.step) > (newest.epoch, newest.step)


def _of_replay(job: JobDirectory, found: Observed) -> Iterator[Problem]:
    audit = found.audit
    if audit is not None and audit.different:
        text = f"a replay of steps {audit.first + 1} to {audit.last} differs at {audit.different}"
        yield Problem(f"{text}: the report has it", command_line("report", job.root))


def save_command(job: JobDirectory, error: str) -> str:
    """Return what helps after a save that failed with this error: on a full disk, to delete old
    checkpoints if there are any; else to look at the storage."""
    with contextlib.suppress(OSError):
        if any(text in error for text in _FULL) and len(scan(job)) > KEPT_ON_A_FULL_DISK:
            return command_line("prune", job.root, "--keep-last", KEPT_ON_A_FULL_DISK)
    return command_line("doctor", job.root)


def failure_command(record: NodeRecord) -> tuple[str, ...]:
    """Return the command, without the directory, that shows why a job failed: what the failed rank
    printed; if it printed nothing, where each rank was for a hang, else what our own processes did.
    """
    last = record.last_failure
    if last is None or not last.tail:
        hung = last is not None and last.kind == FailureClass.HANG.value
        return ("report",) if hung else ("logs", "--processes", "--last")
    return ("logs", "--last", *(("--rank", str(last.rank)) if last.rank >= 0 else ()))


def who(rank: int) -> str:
    """Return the beginning of a line on a failure; empty if no rank was the first."""
    return f"rank {rank} failed: " if rank >= 0 else ""


def exit_code(state: str, warnings: Sequence[str]) -> int:
    """Return 0 for healthy or finished, 1 for degraded or waiting to be restarted, 2 for dead."""
    if state in ("dead", "unknown", RunState.FAILED.value):
        return 2
    if state in (RunState.STARTING.value, RunState.RUNNING.value):
        return 1 if warnings else 0
    return 0 if state in (QUEUED, RunState.FINISHED.value) else 1


def is_silent(beat: Heartbeat | None) -> bool:
    """Return whether no heartbeat has come from another host for too long."""
    return beat is None or beat.age_seconds > SILENT_SECONDS


def _fails(mirror: str) -> bool:
    tries = _FAILING.search(mirror)
    return ": off" in mirror or (tries is not None and int(tries[1]) >= _MIRROR_TRIES)


def _lost_share(worker: WorkerView) -> float:
    """Return the share of a step for which the other ranks wait for a slow one."""
    if not worker.step_seconds or not worker.busy_seconds or not worker.slow:
        return 0.0
    return worker.busy_seconds * (1.0 - 1.0 / worker.slow) / worker.step_seconds


def _stepless(record: NodeRecord, now: float | None) -> str:
    if now is None:
        return f"no step was seen in the script's Session, {STEPLESS}"
    seconds = human_duration(max(0.0, now - record.stepless_since))
    return f"no step for {seconds} in the open Session, {STEPLESS}"


def _no_session(record: NodeRecord, found: Observed) -> bool:
    """Return whether the script has run to its end, or for a minute, without a Session; of one that
    was stopped and has checkpoints from before that is not known."""
    over = found.running or record.state is RunState.FINISHED
    return record.sessionless and not record.saves_itself and (over or found.newest is None)


def _own_trouble(trouble: OwnTrouble, now: float | None) -> str:
    if now is None:
        return f"nothing was sealed: {trouble.text}"
    seconds = human_duration(max(0.0, now - trouble.since))
    unless = "" if trouble.refused else "; correct it, unless the first save is still to come"
    return f"nothing is sealed after {seconds}: {trouble.text}{unless}"
