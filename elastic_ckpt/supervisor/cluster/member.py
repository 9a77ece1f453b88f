"""The supervisor of a node that follows: it serves its own workers and notices, not the job."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from elastic_ckpt.errors import ExitCode
from elastic_ckpt.protocol.ended import Ended, EndKind
from elastic_ckpt.protocol.messages import AgentEvent, HeadLost, JobOver, Joined, Launched
from elastic_ckpt.protocol.rendezvous import Rendezvous
from elastic_ckpt.protocol.run_state import TERMINAL, Event, RunState
from elastic_ckpt.supervisor.cluster.node import OneOfSeveral
from elastic_ckpt.supervisor.settings import RunSettings
from elastic_ckpt.util.units import human_duration

HEAD_BACK_SECONDS: Final = 30.0
"""How long a head that was lost may take to be started again; then this run ends, too."""

_EVENTS: Final = {
    ExitCode.FINISHED: Event.COMPLETED,
    ExitCode.PREEMPTED_SAVED: Event.ABANDONED,
    ExitCode.PREEMPTED_UNSAVED: Event.ABANDONED,
}


class Member(OneOfSeveral):
    """Restarts, saves on an interval, retention and the verdict are the head's business."""

    def __init__(
        self,
        settings: RunSettings,
        say: Callable[[str], None],
        reread: Callable[[], RunSettings],
        rendezvous: Rendezvous,
    ) -> None:
        super().__init__(settings, say, reread, rendezvous)
        self._apart_since: float | None = time.monotonic()
        self._was_joined = False
        where, limit = f"{rendezvous.host}:{rendezvous.port}", settings.gather_seconds
        self._account.say(f"looking for the head at {where}, {human_duration(limit)} at most")

    def _on_event(self, event: AgentEvent) -> None:
        match event:
            case Joined():
                self._on_joined(event)
            case Launched():
                self._begin_incarnation(event.incarnation, event.nodes)
            case HeadLost():
                self._on_head_lost(event.why)
            case JobOver():
                self._on_job_over(ExitCode(event.exit_code), event.message)
            case _:
                super()._on_event(event)

    def _on_agent_lost(self) -> None:
        self._apart_since = time.monotonic()  # the next one has yet to find the head
        super()._on_agent_lost()

    def _serve_start(self, now: float) -> None:
        """Wait for the head, bounded; it launches."""
        if self._apart_since is None:
            return
        if not self._agent_ready:
            self._apart_since = now  # nobody looks for it yet
        limit = self._settings.gather_seconds
        if self._was_joined:
            limit = min(limit, HEAD_BACK_SECONDS)
        if now - self._apart_since > limit:
            where = self._settings.endpoint
            why = f"nobody leads the job at {where} since {limit:.0f} s"
            self._ending.preempt_now(Event.ABANDONED, why, begun=False)

    def _serve_running(self, now: float) -> None:
        """Saves and changes of size are asked for by the head."""

    def _follow_up(self, ended: Ended) -> None:
        if self._state in TERMINAL:
            return  # the head has said how it ends
        if self._state is RunState.DRAINING:
            super()._follow_up(ended)
        elif ended.kind is EndKind.COMPLETED:
            self._account.update(message="done, waiting for the head")
        else:
            what = ended.what or "nodes have changed"
            self._account.move(Event.REGROUP, f"{what}: waiting for the head to go on")

    def _on_joined(self, joined: Joined) -> None:
        self._apart_since = None
        self._was_joined = True
        try:
            same = self._job.known_identity() == joined.identity
        except OSError:
            same = False
        if not same:
            why = f"{self._job.root} is not the job directory of {joined.head}: give all nodes one"
            self._ending.give_up(ExitCode.USAGE, f"{why} on a file system that they share")
            return
        mine = self._settings.terms
        other = [name for name, value in joined.terms.items() if mine.get(name) != value]
        if other:
            why = f"{joined.head} was given other values for {' and '.join(other)}"
            self._ending.give_up(ExitCode.USAGE, f"{why}: start all nodes with the same command")
            return
        self._account.update(run_id=joined.run_id, head=joined.head, job=joined.job)
        self._account.say(f"joined {joined.job}, which {joined.head} leads")

    def _on_head_lost(self, why: str) -> None:
        self._launched = False
        self._apart_since = time.monotonic()
        head = self._account.record.head
        self._journal.write("head_lost", head=head, why=why)
        if self._ending.is_decided:
            return
        message = f"{head} does not answer ({why})"
        if self._state is RunState.DRAINING:
            self._ending.preempt(Event.STOPPED, message)
        else:
            self._account.move(Event.REGROUP, f"{message}: looking for it")

    def _on_job_over(self, code: ExitCode, message: str) -> None:
        if self._ending.is_decided:
            return
        head = self._account.record.head
        if code in (ExitCode.PREEMPTED_SAVED, ExitCode.PREEMPTED_UNSAVED):
            message = f"{head} leaves, and the job with it: {message}"
        self._account.move(_EVENTS.get(code, Event.GIVE_UP), message, exit_code=int(code))
