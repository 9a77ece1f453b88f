"""The role of a node that follows: it serves its own workers and notices, not the job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from elastic_ckpt.errors import ExitCode
from elastic_ckpt.jobdir.run_command import command_line
from elastic_ckpt.journal.node_events import HeadNodeLost
from elastic_ckpt.policy.lease import BUCKET_SURVIVOR_LEASE_SECONDS, SURVIVOR_LEASE_SECONDS
from elastic_ckpt.protocol.ended import Ended, EndKind
from elastic_ckpt.protocol.messages import (
    AgentEvent,
    HeadLost,
    JobOver,
    Joined,
    Launched,
    LeftOut,
)
from elastic_ckpt.protocol.run_state import TERMINAL, Event, RunState
from elastic_ckpt.protocol.succession import NO_PLACE, Follow, Lead, Leave, RosterPlace, Succession
from elastic_ckpt.supervisor.cluster.role import ClusterRole
from elastic_ckpt.supervisor.watch.node_check import NodeCheck
from elastic_ckpt.util.journald import warning
from elastic_ckpt.util.units import human_duration

if TYPE_CHECKING:
    from elastic_ckpt.supervisor.supervisor import Supervisor

HEAD_BACK_SECONDS: Final = 30.0
"""How long a head that was lost may take to come back; then this run ends as well."""

LOOK_SECONDS: Final = 0.25
BUCKET_LOOK_SECONDS: Final = 1.0
"""How often a node without a head looks who leads."""

SEEN_SECONDS: Final = 20.0
"""How long the record of the head's run may take to be seen here: a copy never shows it."""

IDENTITY_SECONDS: Final = 1.0
"""How long to wait for the directory to say whose it is; after that it is asked at each turn."""

_EVENTS: Final = {
    ExitCode.FINISHED: Event.COMPLETED,
    ExitCode.PREEMPTED_SAVED: Event.ABANDONED,
    ExitCode.PREEMPTED_UNSAVED: Event.ABANDONED,
}


class MemberRole(ClusterRole):
    """Restarts, saves on an interval, retention and the verdict are the head's business."""

    def __init__(
        self, endpoint: str, place: RosterPlace = NO_PLACE, check: NodeCheck | None = None
    ) -> None:
        """Take HOST:PORT of the head, this node's place among those that were in the job, and its
        check."""
        super().__init__(check)
        self._endpoint = endpoint
        self.place = place
        self._succession: Succession | None = None  # while there is no head
        self._look_at = 0.0
        self._apart_since: float | None = 0.0
        self._was_joined = place != NO_PLACE
        self._unchecked: Joined | None = None  # until the directory has said whose it is
        self._joined_at = 0.0

    def begin(self, run: Supervisor) -> None:
        """Start looking for the head."""
        self._apart_since = run.now
        self._succession = self._watch(run)
        limit = human_duration(self._limit(run))
        run.record.say(f"looking for the head at {self._endpoint} for up to {limit}")

    def on_event(self, run: Supervisor, event: AgentEvent) -> bool:
        """Follow the head."""
        match event:
            case Joined():
                self._on_joined(run, event)
            case Launched():
                self.place = RosterPlace(event.position, event.nodes - 2)
                run.incarnations.begin(event.incarnation, event.nodes)
            case LeftOut():
                self._on_left_out(run, event.why)
            case HeadLost():
                self._on_head_lost(run, event)
            case JobOver():
                self._on_job_over(run, ExitCode(event.exit_code), event.message)
            case _:
                return super().on_event(run, event)
        return True

    def on_agent_lost(self, run: Supervisor) -> None:
        """Look for the head anew, with another agent."""
        self._apart_since, self._unchecked = run.now, None
        self._succession = self._succession or self._watch(run)

    def serve_start(self, run: Supervisor, now: float) -> None:
        """Wait for the head, bounded; it launches."""
        if self._apart_since is None:
            return
        if not run.incarnations.is_agent_ready:
            self._apart_since = now  # there is no agent yet to look for it
        self._look_who_leads(run, now)
        if run.state in TERMINAL:
            return
        limit = self._limit(run)
        if now - self._apart_since > limit:
            why = f"no head at {self._endpoint} for {limit:.0f} s"
            run.shutdown.preempt_now(Event.ABANDONED, why, stepped=False)

    def _limit(self, run: Supervisor) -> float:
        limit = run.settings.gather_seconds
        return min(limit, HEAD_BACK_SECONDS) if self._was_joined else limit

    def _watch(self, run: Supervisor) -> Succession:
        in_bucket = bool(run.settings.shared_url)
        lease = BUCKET_SURVIVOR_LEASE_SECONDS if in_bucket else SURVIVOR_LEASE_SECONDS
        return Succession(self._endpoint, self.place.position, lease)

    def _look_who_leads(self, run: Supervisor, now: float) -> None:
        """Follow a newer head, or become the head if it is this node's turn."""
        if self._succession is None or now < self._look_at:
            return
        leader = run.ports.directory.leader()
        if leader is None:
            return
        self._look_at = now + (BUCKET_LOOK_SECONDS if run.settings.shared_url else LOOK_SECONDS)
        match step := self._succession.judge(leader, now):
            case Follow(leader):
                run.record.say(f"{leader.node} leads now, at {leader.endpoint}")
            case Lead(leader):
                run.record.say(f"taking the place of {leader.node}")
            case Leave(leader):
                why = f"{leader.node} has ended the job"
                run.shutdown.preempt_now(Event.ABANDONED, why, stepped=False)
                return
        run.goes_on = step

    def look_for_hang(self, run: Supervisor) -> None:
        """Besides hangs, look whether the directory has answered by now."""
        self._check_directory(run, 0.0)
        if not run.shutdown.is_decided and run.state not in TERMINAL:
            super().look_for_hang(run)

    def serve_running(self, run: Supervisor, now: float) -> None:
        """Leave saves and changes of size to the head."""

    def follow_up(self, run: Supervisor, ended: Ended) -> None:
        """Wait for the head to continue, unless this node leaves."""
        if run.state in TERMINAL:
            return  # the head has decided how it ends
        if run.state is RunState.DRAINING:
            run.incarnations.follow_up(ended)
        elif ended.kind is EndKind.COMPLETED:
            run.record.update(message="done, waiting for the head")
        elif self._succession is not None:
            run.record.move(Event.REGROUP)  # it has said whom it waits for
        else:
            what = ended.what or "nodes have changed"
            run.record.move(Event.REGROUP, f"{what}: waiting for the head to continue")

    def _on_joined(self, run: Supervisor, joined: Joined) -> None:
        self._apart_since = self._succession = None
        self._was_joined = True
        self._unchecked, self._joined_at = joined, run.now
        run.shutdown.follow("")
        self._check_directory(run, run.preemption.patience(IDENTITY_SECONDS))
        if run.shutdown.is_decided or run.state in TERMINAL:
            return
        mine = run.settings.terms
        other = [name for name, value in joined.terms.items() if mine.get(name) != value]
        if other:
            why = f"{joined.head} was given other values for {' and '.join(other)}"
            run.shutdown.give_up(ExitCode.USAGE, f"{why}: start all nodes with the same command")
            return
        run.record.update(run_id=joined.run_id, head=joined.head, job=joined.job)
        run.record.say(f"joined {joined.job}, led by {joined.head}")

    def _check_directory(self, run: Supervisor, seconds: float) -> None:
        """End this run if its directory is not the head's; a storage may take long to say so."""
        joined = self._unchecked
        if joined is None or run.shutdown.is_decided:
            return
        identities = run.ports.directory.known_identities(seconds)
        url, limit = run.settings.shared_url, run.settings.gather_seconds
        place = url or run.settings.directory
        if identities is None:
            if run.now - self._joined_at > limit:
                why = f"the storage of {place} did not answer for {human_duration(limit)}"
                run.shutdown.preempt_now(Event.ABANDONED, why, stepped=False)
            return
        is_same = bool(joined.identity) and joined.identity in identities
        job = joined.identity.partition(".")[0]
        is_copy = not is_same and any(one.partition(".")[0] == job for one in identities)
        if is_copy and run.now - self._joined_at < SEEN_SECONDS:
            return  # unless a network file system has only not shown the head's record yet
        self._unchecked = None
        if is_same:
            run.shutdown.follow(joined.identity)
        if is_same and joined.identity != identities[0]:  # it finds out once it reaches its storage
            run.record.say(f"{joined.head} leads a run that another one has taken over")
        elif not is_same:
            what = "bucket" if url else "job directory"
            todo = "the same URL" if url else "one on a file system that they share"
            run.shutdown.give_up(
                ExitCode.USAGE,
                f"{place} is not the {what} of {joined.head}: give all nodes {todo}",
            )

    def _on_left_out(self, run: Supervisor, why: str) -> None:
        if not why:
            run.record.say(f"{run.record.node.head} lets this node in again")
            return
        place = run.settings.shared_url or run.settings.directory
        let_in = command_line("nodes", place, "--let-in", run.settings.node)
        run.record.say(
            warning(f"this node is left out of the job: {why}; to let it in again: {let_in}")
        )
        if not run.incarnations.is_launched:
            run.record.update(message=f"left out of the job: {why}")

    def _on_head_lost(self, run: Supervisor, lost: HeadLost) -> None:
        if self._succession is not None:
            return  # it has left, and then its link broke
        run.incarnations.is_launched = False
        self._apart_since, self._unchecked = run.now, None
        self.place = RosterPlace(lost.position, lost.others)
        self._succession = self._watch(run)
        self.is_passed_on = lost.passed_on
        head = run.record.node.head
        run.ports.journal.write(HeadNodeLost(head=head, why=lost.why))
        if run.shutdown.is_decided or run.state in TERMINAL:
            return
        message = f"{head} does not answer ({lost.why})"
        if lost.passed_on:
            message = f"{head} leaves: {lost.why}"
        if run.state is RunState.DRAINING:
            run.shutdown.preempt(Event.STOPPED, message)
        else:
            todo = "looking for the next head" if lost.passed_on else "looking for it"
            run.record.move(Event.REGROUP, f"{message}: {todo}")

    def _on_job_over(self, run: Supervisor, code: ExitCode, message: str) -> None:
        if run.shutdown.is_decided or run.state in TERMINAL:
            return
        head = run.record.node.head
        if code in (ExitCode.PREEMPTED_SAVED, ExitCode.PREEMPTED_UNSAVED):
            message = f"{head} leaves, and the job with it: {message}"
        run.record.move(_EVENTS.get(code, Event.GIVE_UP), message, exit_code=int(code))
