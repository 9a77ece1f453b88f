"""A job from its first run to its last: restarts it as a requeue would, checks the invariants."""

from __future__ import annotations

from elastic_ckpt.errors import ExitCode
from elastic_ckpt.jobdir.node_record import ProcessIdentity
from elastic_ckpt.policy.lease import LeaseWatch, Verdict
from elastic_ckpt.protocol.slot import Phase
from tests.simulation.hosts import Host, Run
from tests.simulation.kernel import Kernel, Violation
from tests.simulation.network import SimNetwork
from tests.simulation.ranks import Gang
from tests.simulation.storage import Disk

IDENTITY = ProcessIdentity.current()

REPORT_SECONDS = 0.3
"""By which the end of the ranks has reached their supervisor."""

DRAIN_SECONDS = 12.0
"""Any drain of the newest snapshot is done by then, behind that of an older one."""

LIMIT_SECONDS = 3000.0
"""Virtual time by which any job must have finished; faults end long before."""


class World:
    """One schedule.

    Attributes:
        size: hosts of the job.
        nodes: the minimum and the maximum of an incarnation.
        deadly_step: fails ``deaths_left`` times, whatever it resumes from; 0 for none.
    """

    def __init__(self, seed: int) -> None:
        kernel = self.kernel = Kernel(seed)
        draw = kernel.random
        self.size = draw.choices((1, 2, 3, 4, 5), (10, 4, 3, 2, 1))[0]
        self.nodes = (draw.randint(1, self.size), self.size)
        self.has_memory = kernel.chance(0.7)
        self.total_steps = draw.randint(3, 12)
        self.step_seconds = kernel.between(0.3, 4.0)
        slow = kernel.between(0.1, 20.0)
        self.save_seconds = (0.5 * slow, 1.5 * slow)
        self.interval_steps = draw.choice((0, 0, 1, 2, 5))
        self.interval_seconds = draw.choice((0.0, 3.0, 10.0))
        self.grace = draw.choice((2.0, 5.0, 15.0, 30.0))
        self.deadly_step = self.deaths_left = self.failures_injected = 0
        self.identity = IDENTITY
        self.disk = Disk(kernel)
        self.network = SimNetwork(self)
        self.gangs: list[Gang] = []
        self.hosts = [Host(kernel, number) for number in range(self.size)]
        self.spare = Host(kernel, 9)
        self.has_finished = False
        self.fell_back = 0
        self._runs = 0

    def begin(self) -> None:
        """Start the runs of all hosts, at about the same time."""
        for host in self.hosts:
            self.kernel.after(self.kernel.between(0.0, 3.0), lambda host=host: self.start(host))

    def go(self) -> None:
        """Run to the end; raises Violation."""
        self.kernel.run(LIMIT_SECONDS, lambda: self.has_finished)
        if not self.has_finished:
            raise Violation("the job has not finished")

    # -- runs -------------------------------------------------------------------------------------

    def start(self, host: Host) -> None:
        """Start a run on a host that is up, as a service manager or a requeue would."""
        if self.has_finished or host.is_down or (host.run is not None and not host.run.is_gone):
            return
        if self.size > 1 and host.number:
            self._begin(host)
        elif not host.is_claiming:
            host.is_claiming = True
            self._claim(host, None)

    def _begin(self, host: Host) -> None:
        self._runs += 1
        self.kernel.say(f"run {self._runs} starts on {host.name}")
        host.run = Run(self, host, self._runs)

    def _claim(self, host: Host, watch: LeaseWatch | None) -> None:
        """Take the job over, as ``OwnedJob`` does: what happens there to files is not modelled."""
        if self.has_finished or host.is_down:
            host.is_claiming = False
            return
        if self.disk.hangs or host.is_paused:
            self.kernel.after(0.5, lambda: self._claim(host, watch))
            return
        owner, now = self.disk.owner, host.clock.monotonic()
        beat = f"{owner.number}.{owner.beats}".encode() if owner else b""
        if watch is None:
            gone = owner is None or owner.has_ended or (owner.is_gone and owner.host is host)
            watch = LeaseWatch(beat, now, gone=gone)
        verdict = watch.judge(beat, now)
        if verdict is Verdict.WAIT:
            self.kernel.after(0.5, lambda: self._claim(host, watch))
            return
        host.is_claiming = False
        if verdict is Verdict.REFUSE:
            self.kernel.say(f"{host.name}: the job has an owner that is alive")
            if host is not self.spare:
                self.restart(host, 10.0, 30.0)
            return
        if owner is not None and not owner.is_gone and not owner.has_ended and owner.is_reachable:
            raise Violation(f"{host.name} takes the job over from {owner.name}, which is well")
        self._begin(host)

    def restart(self, host: Host, low: float = 1.0, high: float = 5.0) -> None:
        """Start the next run there after a while."""
        self.kernel.after(self.kernel.between(low, high), lambda: self.start(host))

    def gang(self, number: int, size: int, run: Run) -> Gang:
        """Return the ranks of an incarnation, which this node's are about to join."""
        if self.gangs and self.gangs[-1].number == number and self.size > 1:
            return self.gangs[-1]
        if run is self.disk.owner or self.size > 1:
            if number <= self.disk.incarnations:
                raise Violation(f"incarnation {number} is launched after {self.disk.incarnations}")
            self.disk.incarnations = number
        owner = run if self.size == 1 else self.hosts[0].run
        assert owner is not None
        found = Gang(self, number, size, owner)
        self.gangs.append(found)
        return found

    def count_failure(self) -> None:
        """A failure was injected that uses up the budget."""
        self.failures_injected += 1
        for host in (*self.hosts, self.spare):
            if host.run is not None:
                host.run.failures_injected += 1

    # -- invariants -------------------------------------------------------------------------------

    def check_load(self, gang: Gang) -> int:
        """Return the step that ranks load; nothing sealed may be left out."""
        newest, run = self.disk.newest, gang.run
        if self.size == 1:
            kept = run.host.memory.newest
            is_newer = kept is not None and kept.key > newest and self.has_memory
            if kept and is_newer and not self.disk.is_off_the_line(kept.run, run.number):
                newest = kept.key
        self.disk.loaded = max(self.disk.loaded, run.number)
        return max(0, newest[1])

    def on_death(self, run: Run) -> None:
        """A supervisor was killed."""
        self.kernel.say(f"{run.name} was killed")
        self.network.changed()

    def on_exit(self, run: Run) -> None:
        """A supervisor has ended by itself."""
        assert run.code is not None
        self.kernel.say(f"{run.name} exits with {int(run.code)}: {run.record.node.message}")
        self.network.changed()
        if run.leads and run is not self.disk.owner and run.code is not ExitCode.FINISHED:
            # It was taken over, and may have ended for that before it knew the reason.
            if run.host is not self.spare:
                self.restart(run.host, 10.0, 30.0)
            return
        self._check_exit(run, run.code)
        if run.code is ExitCode.FINISHED:  # a member says so only if the head has
            self.has_finished = True
        elif run.code is ExitCode.FAILED and run.tier.not_on_disk() and self.disk.full_until:
            self.restart(run.host, 40.0, 60.0)  # the user has made room
        elif run.code is ExitCode.FAILED and self.deadly_step and self.failures_injected >= 3:
            self.has_finished = True  # the same step failed three times: the policy gives up
        elif run.code is ExitCode.FAILED:
            raise Violation(f"{run.name} gave up: {run.record.node.message}")
        elif run.code in (ExitCode.PREEMPTED_SAVED, ExitCode.PREEMPTED_UNSAVED):
            if not run.host.is_down:
                self.restart(run.host)
        elif run.code is not ExitCode.FINISHED:
            raise Violation(f"{run.name} exits with {int(run.code)}: {run.record.node.message}")

    def _check_exit(self, run: Run, code: ExitCode) -> None:
        gang = next((one for one in reversed(self.gangs) if one.run is run), None)
        done = self.disk.newest[1] >= self.total_steps
        completed = any(one.has_completed for one in self.gangs)
        if code is ExitCode.FINISHED and not (done and completed):
            raise Violation(f"{run.name} says that the job is done")
        # A run that is stopped in the moment of the last seal does not know of it yet, nor does a
        # head that loses a node before that node could report, nor one whose disk does not answer.
        known = gang is not None and run.decided_at - gang.completed_at > REPORT_SECONDS
        known = known and self.disk.answers_at < run.decided_at
        if self.size == 1 and known and done and code != 0:
            raise Violation(f"the job is done, and {run.name} exits with {int(code)}")
        if run.record.node.failures > run.failures_injected:
            raise Violation(f"{run.name} counts {run.record.node.failures} failures")
        if code is ExitCode.PREEMPTED_SAVED and run.leads:
            self._check_saved(run, gang)
        self._check_drained(run, code)
        now, due = run.host.clock.monotonic(), run.deadline
        if now > due and run.host.paused_until < run.newest_at_notice[1]:
            raise Violation(f"{run.name} ends {now - due:.2f} s after its deadline")

    def _check_drained(self, run: Run, code: ExitCode) -> None:
        """A rank was in an evaluation until its deadline: the newest snapshot got to the disk."""
        kept, noticed = run.tier.not_on_disk(), run.newest_at_notice[1]
        if code is not ExitCode.PREEMPTED_UNSAVED or kept is None or run.agent is None:
            return
        evaluated = run.agent.workers.evaluates_until >= run.decided_at
        evaluated = evaluated and run.board.slot.phase is not Phase.SAVING
        could_write = max(self.disk.full_until, self.disk.answers_at) < noticed
        if run.supervisor.preemption.stops_at_once or not (evaluated and could_write):
            return
        now = run.host.clock.monotonic()
        if run.deadline - now + self.kernel.now - noticed >= DRAIN_SECONDS:
            raise Violation(f"{run.name} had time, and step {kept.key[1]} is in memory only")

    def _check_saved(self, run: Run, gang: Gang | None) -> None:
        """A run says that its work is saved: all that a notice could have lost is on the disk."""
        newest = self.disk.newest
        kept = run.tier.not_on_disk()
        if kept is not None and kept.key > newest:
            raise Violation(f"{run.name} says saved, step {kept.key[1]} is in memory only")
        before, at = run.newest_at_notice
        if gang is None or gang.broken_at <= at:  # what a crash lost is not the notice's
            return
        if gang.finished > max(0, newest[1]) and newest <= before:
            raise Violation(f"{run.name} says saved, step {gang.finished} is lost")
