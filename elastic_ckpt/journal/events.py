"""The journal's events: a struct for each kind.

A class is named for what happened; its tag is the name in the journal. Times are seconds, sizes
bytes, steps finished optimizer steps, ranks global; -1 is no rank, or no step. A field has a
default where a line may lack it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

MAX_COUNT: Final = 10**15
MAX_SECONDS: Final = 1e10

Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
RankOrNone = Annotated[int, Meta(ge=-1, le=MAX_COUNT)]
ExitStatus = Annotated[int, Meta(ge=-MAX_COUNT, le=MAX_COUNT)]
Seconds = Annotated[float, Meta(ge=0, le=MAX_SECONDS)]
Value = Annotated[float, Meta(ge=-1e100, le=1e100)]
Values = Annotated[dict[str, Value], Meta(max_length=64)]
Names = Annotated[dict[str, str], Meta(max_length=64)]


class JournalEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """One thing that happened.

    Attributes:
        follows: written by a node that does not lead the job; it does not count for the job.
    """

    follows: bool = False


class Unknown(JournalEvent, frozen=True, tag=""):
    """An event of another version, or one whose fields do not fit."""

    name: str
    data: Mapping[str, Any] = {}


class RunStarted(JournalEvent, frozen=True, tag="start"):
    """A supervisor starts a run.

    Attributes:
        versions: of Python and of packages, by name; ``version`` is this program's.
        revision: ``git describe`` of the script's tree; empty if that is not known.
        slurm_restarts: SLURM_RESTART_COUNT, if it is set.
    """

    run_id: str = ""
    script: str = ""
    nproc: Count = 0
    version: str = ""
    versions: Names = {}
    revision: str = ""
    slurm_restarts: str | None = None


class ScriptStarted(JournalEvent, frozen=True, tag="script"):
    """A script starts without a supervisor."""

    world_size: Count = 0


class RunEnded(JournalEvent, frozen=True, tag="end"):
    """The run is over."""

    state: str = ""
    exit_code: ExitStatus | None = None
    message: str = ""


class WorkersLaunched(JournalEvent, frozen=True, tag="launch"):
    """Workers are about to be launched: ``nproc`` on each of ``nodes`` nodes."""

    incarnation: Count | None = None
    nproc: Count = 0
    nodes: Count = 0


class StateChanged(JournalEvent, frozen=True, tag="state"):
    """The run has another state; ``step`` is what training resumes from, with ``running``."""

    state: str = ""
    message: str = ""
    step: Count | None = None


class IncarnationEnded(JournalEvent, frozen=True, tag="ended"):
    """All workers are gone; ``rank`` failed first, and ``finished`` is the last finished step."""

    incarnation: Count | None = None
    kind: str = ""
    rank: RankOrNone = -1
    exit_code: ExitStatus | None = None
    message: str = ""
    finished: RankOrNone = -1


class Crashed(JournalEvent, frozen=True, tag="crash"):
    """An incarnation failed.

    Attributes:
        rank: the first to fail.
        kind: one of ``FailureClass``.
        tail: the last lines that the rank printed.
        restart_step: of the checkpoint to restart from.
        node: where the failure began, on several nodes; empty on one, or if it is not known.
    """

    rank: RankOrNone = -1
    kind: str = ""
    exit_code: ExitStatus | None = None
    message: str = ""
    tail: tuple[str, ...] = ()
    restart_step: RankOrNone | None = None
    node: str = ""


class HangFound(JournalEvent, frozen=True, tag="hang"):
    """No rank has moved for too long; ``step`` is the furthest, phases and stacks are by rank."""

    rank: RankOrNone = -1
    step: RankOrNone | None = None
    idle_seconds: Seconds = 0.0
    phases: dict[str, str] = {}
    stacks: dict[str, list[str]] = {}


class RecoveryMeasured(JournalEvent, frozen=True, tag="recovery"):
    """The first step after a failure is done; ``stages`` are the seconds of each, in order."""

    total: Seconds
    incarnation: Count | None = None
    stages: dict[str, Seconds] = {}
    step: RankOrNone | None = None
    tier: str = ""


class StepMark(JournalEvent, frozen=True, tag="steps"):
    """Where the training was ``age_seconds`` ago; written every 1 to 30 s.

    ``samples_per_step``, of all ranks, and ``total_steps`` of the job are 0 if unknown.
    """

    step: Count
    epoch: Count = 0
    sample_start_index: int = 0
    samples_per_step: Count = 0
    total_steps: Count = 0
    age_seconds: Seconds = 0.0
    metrics: Values = {}


class StepAgreed(JournalEvent, frozen=True, tag="agreed"):
    """All ranks agreed on the step at whose end they save or stop."""

    request: str = ""
    number: Count = 0
    step: Count = 0


class JobFileReloaded(JournalEvent, frozen=True, tag="reload"):
    """The job file was read again; ``said`` is the result."""

    said: str = ""


class SaveStarted(JournalEvent, frozen=True, tag="save_begun"):
    """All ranks start a save."""

    step: Count = 0
    epoch: Count = 0
    reason: str = ""


class Saved(JournalEvent, frozen=True, tag="saved"):
    """A checkpoint is sealed.

    Attributes:
        path: where it is, or will be after the drain.
        reason: one of ``manifest.Reason``.
        tier: ``memory``, ``disk``, or ``own`` for what the script wrote itself.
        seconds: from the snapshot to the seal.
        stall_seconds: for which training stood still; None if unknown.
    """

    step: Count
    path: str = ""
    epoch: Count = 0
    sample_start_index: int = 0
    reason: str = ""
    tier: str = ""
    attempt: str = ""
    bytes: Count | None = None
    seconds: Seconds = 0.0
    stall_seconds: Seconds | None = None
    world_size: Count = 0
    metrics: Values = {}


class SaveFailure(JournalEvent, frozen=True, tag="save_failed"):
    """A save failed, for which training stood still for ``stall_seconds``."""

    step: Count | None = None
    reason: str = ""
    error: str = ""
    stall_seconds: Seconds = 0.0


class Drained(JournalEvent, frozen=True, tag="drained"):
    """A checkpoint was copied from memory to the disk."""

    path: str = ""
    step: Count | None = None
    bytes: Count = 0
    seconds: Seconds = 0.0
    cpu_seconds: Seconds = 0.0


class DrainFailed(JournalEvent, frozen=True, tag="drain_failed"):
    """A checkpoint could not be copied from memory to the disk."""

    step: Count | None = None
    seconds: Seconds = 0.0
    error: str = ""


class SaveIntervalChanged(JournalEvent, frozen=True, tag="save_interval"):
    """The automatic interval between saves changed."""

    seconds: Seconds = 0.0
    why: str = ""


class NoticeReceived(JournalEvent, frozen=True, tag="notice"):
    """This node goes away in ``seconds``."""

    source: str = ""
    reason: str = ""
    seconds: Seconds | None = None


class WarningReceived(JournalEvent, frozen=True, tag="warning"):
    """This node may go away."""

    source: str = ""
    reason: str = ""


class StartHeld(JournalEvent, frozen=True, tag="held"):
    """This node goes away in ``seconds``, and nothing is started before that."""

    source: str = ""
    reason: str = ""
    seconds: Seconds | None = None


class NoticeSourceFailed(JournalEvent, frozen=True, tag="notice_source"):
    """A source of notices does not answer."""

    source: str = ""
    what: str = ""


class EmergencyChosen(JournalEvent, frozen=True, tag="choice"):
    """What is saved on the notice, and why.

    It should be on the disk in ``predicted_seconds``; the node leaves in ``seconds_left``.
    """

    kind: str = ""
    predicted_seconds: Seconds | None = None
    seconds_left: Seconds | None = None
    why: str = ""


class EmergencySaved(JournalEvent, frozen=True, tag="emergency_save"):
    """What was saved on the notice is on the disk, ``actual_seconds`` after the notice."""

    step: Count | None = None
    predicted_seconds: Seconds | None = None
    actual_seconds: Seconds = 0.0


class CheckpointVerified(JournalEvent, frozen=True, tag="verified"):
    """A checkpoint was verified; ``how`` says how much of it, ``why`` what is wrong with it."""

    intact: bool
    path: str = ""
    why: str = ""
    how: str = ""
    seconds: Seconds = 0.0


class CheckpointLoaded(JournalEvent, frozen=True, tag="loaded"):
    """Training resumes from a checkpoint."""

    path: str = ""
    step: Count | None = None
    epoch: Count | None = None
    sample_start_index: int = 0
    tier: str = ""
    bytes: Count = 0
    seconds: Seconds = 0.0


class WorldResized(JournalEvent, frozen=True, tag="resize"):
    """A checkpoint was loaded by another number of ranks than wrote it."""

    before: Count | None = None
    now: Count | None = None
    step: Count | None = None


class RestoredInexactly(JournalEvent, frozen=True, tag="inexact"):
    """Part of a checkpoint's state could not be restored to the bit."""

    path: str = ""
    reason: str = ""


class Superseded(JournalEvent, frozen=True, tag="superseded"):
    """A checkpoint was set aside because the job was continued from an older one, of ``step``."""

    to: str
    step: int


class Quarantined(JournalEvent, frozen=True, tag="quarantined"):
    """A checkpoint was set aside."""

    path: str = ""
    to: str = ""
    reason: str = ""


class MemoryRefused(JournalEvent, frozen=True, tag="memory_refused"):
    """A checkpoint in memory was not loaded."""

    path: str = ""
    reason: str = ""


class MemoryRemoved(JournalEvent, frozen=True, tag="memory_removed"):
    """The memory tier of a killed run was removed."""

    path: str = ""


class MemoryAdopted(JournalEvent, frozen=True, tag="adopted"):
    """A checkpoint that a killed run left in memory will be drained."""

    step: Count | None = None
    path: str = ""


class AttemptRecovered(JournalEvent, frozen=True, tag="recovered"):
    """What a killed run left on the disk was sealed or removed; ``what`` says which."""

    path: str = ""
    what: str = ""


class CheckpointPruned(JournalEvent, frozen=True, tag="pruned"):
    """Retention deleted a checkpoint."""

    path: str = ""
    step: Count | None = None
    bytes: Count = 0


class PruneFailed(JournalEvent, frozen=True, tag="prune_failed"):
    """Retention could not delete a checkpoint."""

    path: str = ""
    error: str = ""
