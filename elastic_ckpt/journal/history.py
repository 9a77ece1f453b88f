"""What happened to a job, from its journal: runs, incarnations, saves, notices, interruptions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from elastic_ckpt.journal.fields import Entry, Fields
from elastic_ckpt.journal.history_types import (
    Cause,
    Check,
    Incarnation,
    Incident,
    Interruption,
    Notice,
    NoticeKind,
    Recovery,
    Refused,
    Run,
    Sample,
    Save,
)
from elastic_ckpt.journal.incidents import SENTENCES
from elastic_ckpt.journal.time_account import TimeAccount
from elastic_ckpt.protocol.ended import EndKind
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.util.text import printable

LATEST: Final = 250_000_000_000.0
"""Seconds since the epoch that a calendar can still show; what says it was later is left out."""

KILLED: Final = "killed"
"""How an incarnation ended of which nobody could say it."""

_REGROUPED: Final = (EndKind.STOPPED.value, EndKind.NOT_BEGUN.value)


class History:
    """Folds a job's journal, event by event, in order of time; then :meth:`close` it.

    Attributes:
        account: where the time went.
        first, last: of the events that count; None before there is one.
    """

    def __init__(self) -> None:
        self.account = TimeAccount()
        self.first: float | None = None
        self.last: float | None = None
        self.runs: list[Run] = []
        self.incarnations: list[Incarnation] = []
        self.saves: list[Save] = []
        self.notices: list[Notice] = []
        self.interruptions: list[Interruption] = []
        self.recoveries: list[Recovery] = []
        self.checks: list[Check] = []
        self.refused: list[Refused] = []
        self.incidents: list[Incident] = []
        self.samples: list[Sample] = []
        self._noticed: Notice | None = None  # the first notice of the run that runs
        self._stacks: tuple[str, ...] = ()  # of the hang that a crash will tell of

    @property
    def is_supervised(self) -> bool:
        """Whether a supervisor ever ran: without one nobody knows where the time went."""
        return any(run.supervised for run in self.runs)

    def observe(self, event: Entry) -> None:
        """Take the next event into account."""
        if not 0 <= event.wall <= LATEST:
            return
        fields = Fields(event.data)
        if fields.flag("follows"):
            if event.event == NoticeKind.NOTICE.value:
                self._notice(event, fields, follows=True)
            return
        self.account.observe(event)
        if self.first is None:
            self.first = event.wall
        handle = _HANDLERS.get(event.event)
        if handle is not None:
            handle(self, event, fields)
        elif event.event in SENTENCES:
            text = SENTENCES[event.event](fields)
            self.incidents.append(Incident(event.wall, event.event, text))
        self.last = max(self.last or event.wall, event.wall)

    def close(self, *, running: bool) -> None:
        """The journal has ended.

        Args:
            running: the job goes on; else a run without an end was killed.
        """
        if not running and self.last is not None:
            self._end_unsaid(self.last)

    # -- inside -------------------------------------------------------------------------------

    @property
    def _run(self) -> Run | None:
        """The one that runs."""
        return self.runs[-1] if self.runs and self.runs[-1].ended is None else None

    @property
    def _incarnation(self) -> Incarnation | None:
        """The one that runs."""
        last = self.incarnations[-1] if self.incarnations else None
        return last if last is not None and last.ended is None else None

    def _close_incarnation(self, at: float, kind: str) -> Incarnation | None:
        """The one that ran, if one did."""
        found = self._incarnation
        if found is not None:
            found.ended, found.kind = at, kind
        return found

    def _start(self, event: Entry, fields: Fields) -> None:
        self._end_unsaid(event.wall if self.last is None else self.last)
        self._noticed = None
        self.runs.append(Run(event.wall, fields.text("run_id", 80), fields.text("script")))

    def _script(self, event: Entry, fields: Fields) -> None:
        """A script without a supervisor is its own launch."""
        self._end_unsaid(event.wall if self.last is None else self.last)
        self._noticed = None
        self.runs.append(Run(event.wall, supervised=False))
        self.incarnations.append(
            Incarnation(
                event.incarnation, len(self.runs) - 1, event.wall,
                nproc=fields.count("world_size") or 0, nodes=1, first_step_at=event.wall,
            )
        )  # fmt: skip

    def _end_unsaid(self, at: float) -> None:
        """Whatever runs has ended without a word."""
        run = self._run
        self._close_incarnation(at, KILLED)
        if run is None:
            return
        run.ended = at
        if not run.supervised:
            return  # such a script never says that it ends
        run.killed = True
        if self._noticed is None:
            self._interrupt(Cause.KILLED, at, message="the run ended without a word")
        else:
            message = "the node was gone before the run had ended"
            self._interrupt(Cause.PREEMPTION, at, kind=self._noticed.source, message=message)

    def _launch(self, event: Entry, fields: Fields) -> None:
        self._close_incarnation(event.wall, KILLED)
        number = fields.count("incarnation")
        self.incarnations.append(
            Incarnation(
                event.incarnation if number is None else number,
                len(self.runs) - 1,
                event.wall,
                nproc=fields.count("nproc") or 0,
                nodes=fields.count("nodes") or 0,
            )
        )

    def _loaded(self, event: Entry, fields: Fields) -> None:
        epoch, step = fields.count("epoch"), fields.count("step")
        found = self._incarnation
        if found is None:
            return
        found.from_epoch, found.from_step, found.tier = epoch, step, fields.text("tier", 80)
        found.since = self.account.moment_of(epoch or 0, -1 if step is None else step)

    def _state(self, event: Entry, fields: Fields) -> None:
        found = self._incarnation
        if fields.text("state", 80) != RunState.RUNNING.value or found is None:
            return
        if found.first_step_at is None:
            found.first_step_at = event.wall
        if found.from_step is None:
            found.from_step = fields.count("step")

    def _steps(self, event: Entry, fields: Fields) -> None:
        at = event.wall - (fields.seconds("age_seconds") or 0.0)
        self._sample(at, fields)

    def _sample(self, at: float, fields: Fields) -> None:
        step, epoch, found = fields.count("step"), fields.count("epoch") or 0, self._incarnation
        if step is None:
            return
        index = None if found is None else len(self.incarnations) - 1
        if found is not None:
            found.reached_epoch, found.reached_step = epoch, step
        count, metrics = fields.count("samples_per_step") or 0, fields.values("metrics")
        self.samples.append(Sample(at, index, epoch, step, count, metrics))

    def _saved(self, event: Entry, fields: Fields) -> None:
        save = Save(
            event.wall, fields.count("epoch"), fields.count("step"), fields.text("reason", 80),
            fields.text("tier", 80), fields.count("bytes"), fields.seconds("seconds") or 0.0,
            fields.seconds("stall_seconds") or 0.0,
        )  # fmt: skip
        self.saves.append(save)
        if self._noticed is not None:
            self._noticed.saved_step = save.step
        self._sample(event.wall - save.seconds, fields)

    def _drained(self, event: Entry, fields: Fields) -> None:
        """What was in memory when the notice came may be all that is saved on it."""
        if self._noticed is not None and self._noticed.saved_step is None:
            self._noticed.saved_step = fields.count("step")

    def _save_failed(self, event: Entry, fields: Fields) -> None:
        self.saves.append(
            Save(
                event.wall, None, fields.count("step"), fields.text("reason", 80), "", None,
                0.0, fields.seconds("stall_seconds") or 0.0, fields.text("error") or "it failed",
            )
        )  # fmt: skip

    def _notice(self, event: Entry, fields: Fields, *, follows: bool = False) -> None:
        run = len(self.runs) - 1 if self._run is not None else None
        notice = Notice(
            event.wall, run, NoticeKind(event.event), fields.text("source", 80),
            fields.text("reason"), printable(event.node, 80), follows, fields.seconds("seconds"),
        )  # fmt: skip
        self.notices.append(notice)
        if self._noticed is None and notice.kind is NoticeKind.NOTICE and not follows:
            self._noticed = notice

    def _choice(self, event: Entry, fields: Fields) -> None:
        notice = self._noticed
        if notice is not None:
            notice.choice, notice.why = fields.text("kind", 80), fields.text("why")
            notice.predicted_seconds = fields.seconds("predicted_seconds")

    def _emergency_save(self, event: Entry, fields: Fields) -> None:
        notice = self._noticed
        if notice is not None:
            notice.saved_step = fields.count("step")
            notice.predicted_seconds = fields.seconds("predicted_seconds")
            notice.actual_seconds = fields.seconds("actual_seconds")

    def _hang(self, event: Entry, fields: Fields) -> None:
        stacks = event.data.get("stacks")
        ranks = Fields(stacks) if isinstance(stacks, dict) else Fields({})
        self._stacks = tuple(
            f"rank {rank}: {frame}"
            for rank in (map(str, range(8)))
            for frame in ranks.texts(rank, 200)[:12]
        )

    def _ended(self, event: Entry, fields: Fields) -> None:
        kind, rank = fields.text("kind", 80), fields.code("rank")
        found = self._close_incarnation(event.wall, kind)
        if found is not None:
            found.rank, found.message = -1 if rank is None else rank, fields.text("message")
        if kind in _REGROUPED and self._noticed is None:
            self._interrupt(Cause.REGROUPING, event.wall, message=fields.text("message"))

    def _crash(self, event: Entry, fields: Fields) -> None:
        kind, rank = fields.text("kind", 80), fields.code("rank")
        stacks, self._stacks = self._stacks if kind == "hang" else (), ()
        found = self._close_incarnation(event.wall, EndKind.CRASHED.value)
        if found is not None:  # the agent went, who would have said that it ended
            found.message = fields.text("message")
        at = event.wall
        if self.incarnations and self.incarnations[-1].ended is not None:
            at = min(at, self.incarnations[-1].ended)
        self._interrupt(
            Cause.FAILURE, at, kind=kind or "unknown", rank=-1 if rank is None else rank,
            exit_code=fields.code("exit_code"), message=fields.text("message"),
            tail=fields.texts("tail", 200), stacks=stacks,
        )  # fmt: skip

    def _end(self, event: Entry, fields: Fields) -> None:
        run = self._run
        if run is None:
            return
        run.ended, run.state = event.wall, fields.text("state", 80)
        run.exit_code, run.message = fields.code("exit_code"), fields.text("message")
        self._close_incarnation(event.wall, KILLED)
        if run.state == RunState.FINISHED.value:
            return
        last = self.incarnations[-1] if self.incarnations else None
        own = last is not None and last.run == len(self.runs) - 1
        at = last.ended if own and last is not None and last.ended is not None else event.wall
        if run.state == RunState.PREEMPTED.value:
            source = self._noticed.source if self._noticed is not None else ""
            self._interrupt(Cause.PREEMPTION, at, kind=source, message=run.message)
        elif not self._has_said_why():
            self._interrupt(Cause.GAVE_UP, at, message=run.message)

    def _has_said_why(self) -> bool:
        """Whether the newest incarnation's failure is known already."""
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

    def _recovery(self, event: Entry, fields: Fields) -> None:
        total = fields.seconds("total")
        if total is None:
            return
        stages = {name: max(0.0, value) for name, value in fields.values("stages").items()}
        self.recoveries.append(
            Recovery(
                event.wall, fields.count("incarnation") or event.incarnation, total, stages,
                fields.count("step"), fields.text("tier", 80),
            )
        )  # fmt: skip

    def _verified(self, event: Entry, fields: Fields) -> None:
        intact = fields.flag("intact") or fields.flag("valid")  # the latter in old journals
        self.checks.append(
            Check(
                event.wall, fields.text("path"), intact, fields.text("why"),
                fields.text("how", 80), fields.seconds("seconds") or 0.0,
            )
        )  # fmt: skip

    def _refuse(self, event: Entry, fields: Fields) -> None:
        path, to, reason = fields.text("path"), fields.text("to"), fields.text("reason")
        self.refused.append(Refused(event.wall, path, to, reason))


_Handler = Callable[[History, Entry, Fields], None]

_HANDLERS: Final[dict[str, _Handler]] = {
    "start": History._start,
    "script": History._script,
    "launch": History._launch,
    "loaded": History._loaded,
    "state": History._state,
    "steps": History._steps,
    "saved": History._saved,
    "save_failed": History._save_failed,
    "drained": History._drained,
    "notice": History._notice,
    "warning": History._notice,
    "held": History._notice,
    "choice": History._choice,
    "emergency_save": History._emergency_save,
    "hang": History._hang,
    "ended": History._ended,
    "crash": History._crash,
    "end": History._end,
    "recovery": History._recovery,
    "verified": History._verified,
    "quarantined": History._refuse,
    "memory_refused": History._refuse,
}
