"""What happened to a job, from its journal: runs, incarnations, saves, notices, interruptions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from elastic_ckpt.journal.audit_events import Audited
from elastic_ckpt.journal.events import (
    CheckpointLoaded,
    CheckpointVerified,
    Crashed,
    Drained,
    DrainFailed,
    EmergencyChosen,
    EmergencySaved,
    HangFound,
    IncarnationEnded,
    JournalEvent,
    MemoryRefused,
    NoticeReceived,
    Quarantined,
    RecoveryMeasured,
    RunEnded,
    RunStarted,
    Saved,
    SaveFailure,
    ScriptStarted,
    StartHeld,
    StateChanged,
    StepMark,
    WarningReceived,
    WorkersLaunched,
)
from elastic_ckpt.journal.history_types import (
    Cause,
    Incarnation,
    Incident,
    Interruption,
    NoticeKind,
    PastNotice,
    PastSave,
    Recovery,
    Refused,
    Run,
    Sample,
)
from elastic_ckpt.journal.incidents import audited, sentence
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.journal.peer_copies import PeerCopies
from elastic_ckpt.journal.time_account import TimeAccount
from elastic_ckpt.protocol.ended import EndKind
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.util.text import printable

LATEST: Final = 250_000_000_000.0
"""Seconds since the epoch that a calendar can still show; later entries are ignored."""

KILLED: Final = "killed"
"""How an incarnation ended if no entry says it."""

_REGROUPED: Final = (EndKind.STOPPED.value, EndKind.NOT_BEGUN.value)


class History:
    """Folds a job's journal, entry by entry, in order of time; :meth:`close` ends it.

    Attributes:
        account: where the time went.
        copies: what nodes have of each other's memory.
        first, last: when the first and the last entry that counts was written; None without one.
        verified: number of verifications that passed, by how much of the checkpoint was read.
        marks: the step marks of the newest incarnation, and when each was written.
        audit: the last replay of a part of it, and when that was; None without one.
    """

    def __init__(self) -> None:
        self.account = TimeAccount()
        self.copies = PeerCopies()
        self.first: float | None = None
        self.last: float | None = None
        self.runs: list[Run] = []
        self.incarnations: list[Incarnation] = []
        self.saves: list[PastSave] = []
        self.notices: list[PastNotice] = []
        self.interruptions: list[Interruption] = []
        self.recoveries: list[Recovery] = []
        self.verified: Counter[str] = Counter()
        self.refused: list[Refused] = []
        self.incidents: list[Incident] = []
        self.samples: list[Sample] = []
        self.marks: list[tuple[float, StepMark]] = []
        self.last_emergency: EmergencySaved | None = None
        self.audit: tuple[float, Audited] | None = None
        self._noticed: PastNotice | None = None  # the first notice of the running run
        self._stacks: tuple[str, ...] = ()  # of a hang, for the crash that follows

    @classmethod
    def of(cls, entries: Iterable[JournalEntry]) -> History:
        """Return the history of a whole journal, not yet closed."""
        history = cls()
        for entry in entries:
            history.observe(entry)
        return history

    @property
    def is_supervised(self) -> bool:
        """Whether a supervisor ever ran: without one it is unknown where the time went."""
        return any(run.supervised for run in self.runs)

    def observe(self, entry: JournalEntry) -> None:
        """Take the next entry into account."""
        at, event = entry.wall, entry.event
        if not 0 <= at <= LATEST:
            return
        self.copies.observe(entry)
        if event.follows:
            if isinstance(event, NoticeReceived):
                self._notice(entry, event)
            return
        if isinstance(event, Audited):  # the job itself may be over
            before = self.audit[1] if self.audit is not None else None
            if before is None or not before.different or event.covers(before.at):
                self.audit = at, event  # else what is known to be wrong is not known to be right
            self.incidents.append(Incident(at, entry.name, audited(event)))
            return
        self.account.observe(entry)
        if self.first is None:
            self.first = at
        self._observe_run(entry, event)
        self._observe_save(at, event)
        self._observe_checkpoint(at, event)
        if isinstance(event, NoticeReceived | WarningReceived | StartHeld):
            self._notice(entry, event)
        elif (text := sentence(event)) is not None:
            self.incidents.append(Incident(at, entry.name, text))
        self.last = max(self.last or at, at)

    def close(self, *, running: bool) -> None:
        """End the history.

        Args:
            running: the job still runs; if not, a run without an end was killed.
        """
        if not running and self.last is not None:
            self._end_silently(self.last)

    def _observe_run(self, entry: JournalEntry, event: JournalEvent) -> None:
        at = entry.wall
        match event:
            case RunStarted():
                self._begin(at, _run(entry, event))
            case ScriptStarted():
                self._begin_script(entry, event)
            case WorkersLaunched():
                self._launch(entry, event)
            case StateChanged(state=RunState.RUNNING.value):
                self._train(at, event)
            case StepMark():
                self.marks.append((at, event))
                self._sample(at - event.age_seconds, event)
            case HangFound():
                self._stacks = tuple(
                    f"rank {rank}: {printable(frame, 200)}"
                    for rank in map(str, range(8))
                    for frame in event.stacks.get(rank, ())[-64:][:12]
                )
            case IncarnationEnded():
                self._ended(at, event)
            case Crashed():
                self._crash(entry, event)
            case RunEnded():
                self._end(at, event)
            case RecoveryMeasured():
                stages = {printable(name, 80): value for name, value in event.stages.items()}
                step = event.step if event.step is not None and event.step >= 0 else None
                self.recoveries.append(Recovery(at, event.total, stages, step, _short(event.tier)))

    def _observe_save(self, at: float, event: JournalEvent) -> None:
        notice = self._noticed
        match event:
            case Saved(bytes=size, seconds=seconds, stall_seconds=stall):
                reason, tier = _short(event.reason), _short(event.tier)
                self.saves.append(PastSave(at, reason, tier, size, seconds, stall or 0.0))
                self._sample(at - seconds, event)
                if notice is not None:
                    notice.saved_step = event.step
            case SaveFailure(stall_seconds=stall):
                reason, error = _short(event.reason), printable(event.error) or "it failed"
                self.saves.append(PastSave(at, reason, "", None, 0.0, stall, error))
            case Drained():
                self._drained("")
                if notice is not None and notice.saved_step is None:
                    # What was in memory when the notice came may be all that is saved on it.
                    notice.saved_step = event.step
            case DrainFailed():
                self._drained(printable(event.error))
            case EmergencyChosen() if notice is not None:
                notice.why = printable(event.why)
                notice.predicted_seconds = event.predicted_seconds
            case EmergencySaved(predicted_seconds=predicted):
                self.last_emergency = event
                if self.saves:
                    self.saves[-1].predicted_seconds = predicted
                if notice is not None:
                    notice.saved_step, notice.predicted_seconds = event.step, predicted
                    notice.actual_seconds = event.actual_seconds

    def _drained(self, error: str) -> None:
        if self.saves:
            self.saves[-1].drain_error = error

    def _observe_checkpoint(self, at: float, event: JournalEvent) -> None:
        match event:
            case CheckpointLoaded():
                self._loaded(event)
            case CheckpointVerified(intact=True):
                self.verified[event.how] += 1
            case Quarantined():
                path, to = printable(event.path), printable(event.to)
                self.refused.append(Refused(at, path, to, printable(event.reason)))
            case MemoryRefused():
                path = printable(event.path)
                self.refused.append(Refused(at, path, "", printable(event.reason)))

    @property
    def _run(self) -> Run | None:
        return self.runs[-1] if self.runs and self.runs[-1].ended is None else None

    @property
    def _incarnation(self) -> Incarnation | None:
        last = self.incarnations[-1] if self.incarnations else None
        return last if last is not None and last.ended is None else None

    def _close_incarnation(self, at: float, kind: str) -> Incarnation | None:
        """End the running incarnation and return it, if there is one."""
        found = self._incarnation
        if found is not None:
            found.ended, found.kind = at, kind
        return found

    def _begin(self, at: float, run: Run) -> None:
        self._end_silently(at if self.last is None else self.last)
        self._noticed = None
        self.runs.append(run)

    def _begin_script(self, entry: JournalEntry, event: ScriptStarted) -> None:
        """Take a script without a supervisor, which is its own launch, into account."""
        run = Run(supervised=False, began=entry.wall, node=_short(entry.node))
        self._begin(entry.wall, run)
        self.incarnations.append(
            Incarnation(
                entry.incarnation, len(self.runs) - 1, entry.wall,
                nproc=event.world_size, nodes=1, first_step_at=entry.wall,
            )
        )  # fmt: skip

    def _end_silently(self, at: float) -> None:
        """End what runs without an entry that says so."""
        run = self._run
        self._close_incarnation(at, KILLED)
        if run is None:
            return
        run.ended = at
        if not run.supervised:
            return  # such a script never journals its end
        run.killed = True
        if self._noticed is None:
            message = "the run ended without a word"
            self._interrupt(Cause.KILLED, at, message=message, node=run.node)
        else:
            self._preempted(at, "the node was gone before the run had ended")

    def _launch(self, entry: JournalEntry, event: WorkersLaunched) -> None:
        self.marks.clear()
        self._close_incarnation(entry.wall, KILLED)
        number = entry.incarnation if event.incarnation is None else event.incarnation
        run = len(self.runs) - 1
        self.incarnations.append(
            Incarnation(number, run, entry.wall, nproc=event.nproc, nodes=event.nodes)
        )

    def _loaded(self, event: CheckpointLoaded) -> None:
        epoch, step, found = event.epoch, event.step, self._incarnation
        if found is None:
            return
        found.from_epoch, found.from_step, found.tier = epoch, step, _short(event.tier)
        found.since = self.account.moment_of(epoch or 0, -1 if step is None else step)

    def _train(self, at: float, event: StateChanged) -> None:
        found = self._incarnation
        if found is None:
            return
        if found.first_step_at is None:
            found.first_step_at = at
        if found.from_step is None:
            found.from_step = event.step

    def _sample(self, at: float, event: StepMark | Saved) -> None:
        found = self._incarnation
        index = None if found is None else len(self.incarnations) - 1
        if found is not None:
            found.reached_epoch, found.reached_step = event.epoch, event.step
        count = event.samples_per_step if isinstance(event, StepMark) else 0
        metrics = {printable(name, 80): value for name, value in event.metrics.items()}
        self.samples.append(Sample(at, index, event.epoch, event.step, count, metrics))

    def _notice(
        self, entry: JournalEntry, event: NoticeReceived | WarningReceived | StartHeld
    ) -> None:
        run = len(self.runs) - 1 if self._run is not None else None
        seconds = None if isinstance(event, WarningReceived) else event.seconds
        notice = PastNotice(
            entry.wall, run, NoticeKind(entry.name), _short(event.source),
            printable(event.reason), event.follows, seconds, node=_short(entry.node),
        )  # fmt: skip
        self.notices.append(notice)
        if self._noticed is None and isinstance(event, NoticeReceived) and not event.follows:
            self._noticed = notice

    def _ended(self, at: float, event: IncarnationEnded) -> None:
        message = printable(event.message)
        found = self._close_incarnation(at, _short(event.kind))
        if found is not None:
            found.message = message
        if event.kind in _REGROUPED and self._noticed is None:
            self._interrupt(Cause.REGROUPING, at, message=message)

    def _crash(self, entry: JournalEntry, event: Crashed) -> None:
        at = entry.wall
        kind, message = _short(event.kind), printable(event.message)
        stacks, self._stacks = self._stacks if kind == "hang" else (), ()
        found = self._close_incarnation(at, EndKind.CRASHED.value)
        if found is not None:  # the agent is gone, which would have reported its end
            found.message = message
        if self.incarnations and self.incarnations[-1].ended is not None:
            at = min(at, self.incarnations[-1].ended)
        alone = not self.incarnations or self.incarnations[-1].nodes <= 1
        node = event.node or (entry.node if alone else "")
        self._interrupt(
            Cause.FAILURE, at, kind=kind or "unknown", rank=event.rank, message=message,
            tail=tuple(printable(line, 200) for line in event.tail[-64:]), stacks=stacks,
            node=_short(node),
        )  # fmt: skip

    def _end(self, at: float, event: RunEnded) -> None:
        run = self._run
        if run is None:
            return
        run.ended, run.exit_code = at, event.exit_code
        message = printable(event.message)
        self._close_incarnation(at, KILLED)
        if event.state == RunState.FINISHED.value:
            return
        last = self.incarnations[-1] if self.incarnations else None
        if last is not None and last.run == len(self.runs) - 1 and last.ended is not None:
            at = last.ended
        if event.state == RunState.PREEMPTED.value:
            self._preempted(at, message)
        elif not self._is_explained():
            self._interrupt(Cause.GAVE_UP, at, message=message, node=run.node)

    def _preempted(self, at: float, message: str) -> None:
        found = self._noticed
        source, node = (found.source, found.node) if found is not None else ("", "")
        self._interrupt(Cause.PREEMPTION, at, kind=source, message=message, node=node)

    def _is_explained(self) -> bool:
        """Whether the newest incarnation's failure is an interruption already."""
        last = self.interruptions[-1] if self.interruptions else None
        return (
            last is not None
            and last.cause is Cause.FAILURE
            and last.run == len(self.runs) - 1
            and last.incarnation == (self.incarnations[-1].number if self.incarnations else 0)
        )

    def _interrupt(self, cause: Cause, at: float, **fields: Any) -> None:
        own = self.incarnations and self.incarnations[-1].run == len(self.runs) - 1
        number = self.incarnations[-1].number if own else 0
        self.interruptions.append(Interruption(cause, at, len(self.runs) - 1, number, **fields))


def _run(entry: JournalEntry, event: RunStarted) -> Run:
    return Run(
        began=entry.wall, node=_short(entry.node), script=printable(event.script),
        version=_short(event.version), revision=printable(event.revision, 200),
        versions={_short(name): _short(version) for name, version in event.versions.items()},
    )  # fmt: skip


def _short(text: str) -> str:
    return printable(text, 80)
