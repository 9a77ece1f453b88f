"""A job from its first run to its last: restarts it as a requeue would, checks the invariants."""

from __future__ import annotations

from collections.abc import Callable

from elastic_ckpt.errors import ExitCode
from elastic_ckpt.jobdir.node_record import ProcessIdentity
from elastic_ckpt.policy.lease import BEAT_SECONDS, LeaseWatch, Verdict
from elastic_ckpt.protocol.slot import Phase
from elastic_ckpt.protocol.succession import Leader
from elastic_ckpt.supervisor.ports import NO_CHECKPOINT, Key
from tests.simulation.agents import SimAgent
from tests.simulation.bucket_copies import SimBucket
from tests.simulation.disk import Checkpoint, Disk
from tests.simulation.gang import Gang
from tests.simulation.hosts import Host, Team
from tests.simulation.kernel import Kernel, Violation
from tests.simulation.network import SimNetwork
from tests.simulation.run import Part, Run
from tests.simulation.shared_memory import SharedMemory

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
        hosts: those that it is started on.
        spare: those on which it is run a second time.
        nodes: the minimum and the maximum of an incarnation.
        deadly_step: fails ``deaths_left`` times, whatever it resumes from; 0 for none.
        shared_memory: saves go into the memory of several nodes; None if not.
    """

    beat_seconds = BEAT_SECONDS
    shared_memory: SharedMemory | None = None

    def __init__(self, seed: int, size: int = 0) -> None:
        """``size`` is drawn as well if it is 0."""
        kernel = self.kernel = Kernel(seed)
        draw = kernel.random
        self.size = size or draw.choices((1, 2, 3, 4, 5), (10, 4, 3, 2, 1))[0]
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
        self.bucket = SimBucket(kernel, seed)
        self.network = SimNetwork(self)
        self.gangs: list[Gang] = []
        least = max(self.nodes[0], min(self.size, 2))
        self.first, self.spare = Team(kernel, 0, self.size), Team(kernel, 10, least)
        self.hosts = self.first.hosts
        self.all_hosts = [*self.first.hosts, *self.spare.hosts]
        self.has_finished = False
        self.fell_back = 0
        self._runs = 0

    def begin(self) -> None:
        """Start the runs of all hosts, at about the same time."""
        self.call(self.first)

    def call(self, team: Team, start_from: Key | None = None) -> None:
        """Start the job on all hosts of a team, as ``srun`` or a requeue would."""
        team.is_called = True
        for host in team.hosts:
            later = self.kernel.between(0.0, 3.0)
            self.kernel.after(later, lambda host=host: self.start(host, start_from))

    def go(self) -> None:
        """Run to the end; raises Violation."""
        self.kernel.run(LIMIT_SECONDS, lambda: self.has_finished)
        if not self.has_finished:
            raise Violation("the job has not finished")

    # -- runs -------------------------------------------------------------------------------------

    def start(self, host: Host, start_from: Key | None = None) -> None:
        """Start a run on a host that is up, as a service manager or a requeue would.

        Args:
            start_from: the checkpoint of ``--from``.
        """
        if self.has_finished or host.is_down or host.is_busy:
            return
        if not host.leads:
            self._begin(host)
        elif not host.is_claiming:
            host.is_claiming = True
            self._claim(host, None, start_from)

    def _begin(self, host: Host, start_from: Key | None = None, part: Part | None = None) -> None:
        self._runs += 1
        self.kernel.say(f"run {self._runs} starts on {host.name}")
        host.run = Run(self, host, self._runs, start_from, part)

    def leader(self, host: Host) -> Leader | None:
        """Return who leads, as a host sees it: here the nodes meet where their team says."""
        return None

    def dialled(self, run: Run) -> Host:
        """Return the host on which a run looks for its head."""
        return run.host.dials

    def change_part(self, run: Run) -> None:
        """A head lets others lead. Nobody is told of another place here: it leads again."""
        run.die()
        self.restart(run.host)

    def _claim(self, host: Host, watch: LeaseWatch | None, start_from: Key | None) -> None:
        """Take the job over, as ``OwnedJob`` does: what happens there to files is not modelled."""
        if self.has_finished or host.is_down:
            host.is_claiming = False
            return
        if self.disk.hangs(host) or host.is_paused:
            self.kernel.after(0.5, lambda: self._claim(host, watch, start_from))
            return
        owner, now = self.disk.owner, host.clock.monotonic()
        beat = f"{owner.number}.{owner.beats}".encode() if owner else b""
        has_its_lock = (
            owner is not None
            and owner.host.machine == host.machine
            and (owner.is_gone or self.disk.lock_is_lost)
        )
        if watch is None:
            gone = owner is None or owner.has_ended or has_its_lock
            watch = LeaseWatch(beat, now, gone=gone)
        verdict = watch.judge(beat, now)
        if verdict is Verdict.WAIT:
            self.kernel.after(0.5, lambda: self._claim(host, watch, start_from))
            return
        host.is_claiming = False
        if verdict is Verdict.REFUSE:
            self.kernel.say(f"{host.name}: the job has an owner that is alive")
            self._give_way(host)
            return
        if (
            owner is not None
            and not (owner.is_gone or owner.has_ended or has_its_lock)
            and owner.is_reachable
        ):
            raise Violation(f"{host.name} takes the job over from {owner.name}, which is well")
        self.disk.lock_is_lost = False
        self._begin(host, start_from)

    def _give_way(self, host: Host) -> None:
        """The head of a team has found another owner; a service manager tries again."""
        if host.team is self.first:
            self.restart(host, 10.0, 30.0)
        else:
            host.team.is_called = False

    def suspend(self, host: Host, seconds: float) -> None:
        """Have all processes of a host stop for a while."""
        host.paused_until = self.kernel.now + seconds
        self.network.changed()
        self.kernel.after(seconds, lambda: None if host.is_paused else self.go_on(host))

    def go_on(self, host: Host) -> None:
        """End the pause of a host."""
        host.paused_until = min(host.paused_until, self.kernel.now)
        host.go_on()
        self.network.changed()

    def restart(self, host: Host, low: float = 1.0, high: float = 5.0) -> None:
        """Start the next run there after a while."""
        if host.team.is_called:
            self.kernel.after(self.kernel.between(low, high), lambda: self.start(host))

    def gang(self, number: int, size: int, agent: SimAgent) -> Gang:
        """Return the ranks of an incarnation, which this node's are about to join."""
        run = agent.head
        assert run is not None
        for one in reversed(self.gangs[-8:]):
            if (one.number, one.run) == (number, run) and self.size > 1:
                return one
        if run is self.disk.owner:
            if number <= self.disk.incarnations:
                raise Violation(f"incarnation {number} is launched after {self.disk.incarnations}")
            self.disk.incarnations = number
        found = Gang(self, number, size, run)
        self.gangs.append(found)
        return found

    def count_failure(self) -> None:
        """A failure was injected that uses up the budget."""
        self.failures_injected += 1
        for host in self.all_hosts:
            if host.run is not None:
                host.run.failures_injected += 1

    # -- invariants -------------------------------------------------------------------------------

    def load(self, gang: Gang) -> Checkpoint | None:
        """Return what ranks load; nothing sealed may be left out."""
        disk, run = self.disk, gang.run
        found = disk.sealed.get(disk.newest)
        if self.size == 1 and self.has_memory and (kept := run.host.memory.newest) is not None:
            is_newer = kept.key > disk.newest
            if is_newer and not disk.is_off_the_line(kept.checkpoint, run):
                found = kept.checkpoint
        elif self.shared_memory is not None:
            found = self.shared_memory.load(gang, found)
        disk.loaded = max(disk.loaded, run.number)
        if run is disk.owner and run.start_from is not None:
            key = found.key if found else NO_CHECKPOINT
            own = found is not None and found.run == run.number
            if key != run.start_from and not own and run.start_from not in disk.set_aside:
                raise Violation(f"{run.name} loads step {key[1]}, not that of --from")
        return found

    def on_death(self, run: Run) -> None:
        """A supervisor was killed."""
        self.kernel.say(f"{run.name} was killed")
        self.network.changed()

    def on_exit(self, run: Run) -> None:
        """A supervisor has ended by itself."""
        assert run.code is not None
        self.kernel.say(f"{run.name} exits with {int(run.code)}: {run.record.node.message}")
        self.network.changed()
        head = self._head_of(run)
        is_stale = head is not None and head is not self.disk.owner
        if is_stale and run.code is ExitCode.FINISHED and self._was_done(head):
            return
        if is_stale and run.code is not ExitCode.FINISHED:
            # It was taken over, and may have ended for that before it knew the reason.
            self._check_superseded(run, run.code)
            if run.leads:
                self._give_way(run.host)
            else:
                self.restart(run.host)
            return
        lacks = self._check_bucket(run, run.code)
        self._check_exit(run, run.code)
        if run.code is ExitCode.FINISHED:  # a member says so only if the head has
            self.has_finished = True
        elif run.code is ExitCode.FAILED and run.tier.not_on_disk() and self.disk.full_until:
            self.restart(run.host, 40.0, 60.0)  # the user has made room
        elif run.code is ExitCode.FAILED and self.deadly_step and self.failures_injected >= 3:
            self.has_finished = True  # the same step failed three times: the policy gives up
        elif run.code is ExitCode.FAILED and lacks:
            self.restart(run.host, 40.0, 60.0)
        elif run.code is ExitCode.FAILED:
            raise Violation(f"{run.name} gave up: {run.record.node.message}")
        elif run.code in (ExitCode.PREEMPTED_SAVED, ExitCode.PREEMPTED_UNSAVED):
            if not run.host.is_down:
                self.restart(run.host)
        elif run.code is not ExitCode.FINISHED:
            raise Violation(f"{run.name} exits with {int(run.code)}: {run.record.node.message}")

    def _was_done(self, head: Run | None) -> bool:
        """Whether a run had ended before another one took the job over, perhaps to go back."""
        owner = self.disk.owner
        return head is not None and owner is not None and 0.0 < head.decided_at <= owner.began

    def _check_exit(self, run: Run, code: ExitCode) -> None:
        gang = self._gang_of(run)
        done = self.disk.newest[1] >= self.total_steps
        completed = any(one.has_completed for one in self.gangs)
        if code is ExitCode.FINISHED and not (done and completed):
            raise Violation(f"{run.name} says that the job is done")
        # A run that is stopped in the moment of the last seal does not know of it yet, nor does a
        # head that loses a node before that node could report, nor one whose disk does not answer.
        known = gang is not None and run.decided_at - gang.completed_at > REPORT_SECONDS
        known = known and self.disk.answers(run.host) < run.decided_at
        if self.size == 1 and known and done and code != 0 and not self._bucket_lags:
            raise Violation(f"the job is done, and {run.name} exits with {int(code)}")
        if run.record.node.failures > run.failures_injected:
            raise Violation(f"{run.name} counts {run.record.node.failures} failures")
        if code is ExitCode.PREEMPTED_SAVED and run.leads:
            self._check_saved(run, gang)
        self._check_drained(run, code)
        self._check_in_time(run)

    @property
    def _bucket_lags(self) -> bool:
        """Whether the bucket is the job's place, and has not all that the disk has."""
        is_place = self.bucket.is_there and self.size == 1
        return is_place and self.bucket.newest < self.disk.newest

    def _check_bucket(self, run: Run, code: ExitCode) -> bool:
        """What the bucket lacks is not called saved; return whether it lacks anything."""
        if self._bucket_lags and code in (ExitCode.FINISHED, ExitCode.PREEMPTED_SAVED):
            raise Violation(f"{run.name} exits with {int(code)}, and its bucket lacks it")
        return self._bucket_lags

    def _check_in_time(self, run: Run) -> None:
        now, due = run.host.clock.monotonic(), run.deadline
        if now > due and run.host.paused_until < run.newest_at_notice[1]:
            raise Violation(f"{run.name} ends {now - due:.2f} s after its deadline")

    def _gang_of(self, run: Run) -> Gang | None:
        head = self._head_of(run)
        return next((one for one in reversed(self.gangs) if one.run is head), None)

    def _head_of(self, run: Run) -> Run | None:
        """Return the run that led this one, itself perhaps; None if it has not joined any."""
        return run if run.leads else run.agent.head if run.agent else None

    def _check_superseded(self, run: Run, code: ExitCode) -> None:
        """A run that was taken over does not say that its work is saved, unless it is."""
        self._check_in_time(run)
        if code is ExitCode.USAGE:
            raise Violation(f"{run.name} exits with {int(code)}: {run.record.node.message}")
        gang = self._gang_of(run)
        if code is not ExitCode.PREEMPTED_SAVED or gang is None or not gang.is_loaded:
            return
        if gang.broken_at <= run.newest_at_notice[1]:
            return
        if run.passed_on:  # it had decided before
            self._check_saved(run, gang)
            return
        known = self.disk.known.values()
        own = [one.key[1] for one in known if one.run == gang.run.number]
        if gang.finished > max(own, default=gang.start_step):
            raise Violation(f"{run.name} was taken over and says saved, {gang.finished} is lost")

    def _check_drained(self, run: Run, code: ExitCode) -> None:
        """A rank was in an evaluation until its deadline: the newest snapshot got to the disk."""
        kept, noticed = run.tier.not_on_disk(), run.newest_at_notice[1]
        if code is not ExitCode.PREEMPTED_UNSAVED or kept is None or run.agent is None:
            return
        evaluated = run.agent.workers.evaluates_until >= run.decided_at
        evaluated = evaluated and run.board.slot.phase is not Phase.SAVING
        could_write = max(self.disk.full_until, self.disk.answers(run.host)) < noticed
        runs = run.host.paused_until < noticed
        if run.supervisor.preemption.stops_at_once or not (evaluated and could_write and runs):
            return
        now = run.host.clock.monotonic()
        if run.deadline - now + self.kernel.now - noticed >= DRAIN_SECONDS:
            raise Violation(f"{run.name} had time, and step {kept.key[1]} is in memory only")

    def _check_saved(self, run: Run, gang: Gang | None) -> None:
        """A run says that its work is saved: all that a notice could have lost is on the disk."""
        newest, handed_over = self.disk.newest, run.tier.handed_over
        if handed_over is not None:
            newest = max(newest, handed_over[0])
        kept = run.tier.not_on_disk()
        if kept is not None and kept.key > newest:
            raise Violation(f"{run.name} says saved, step {kept.key[1]} is in memory only")
        before, at = run.newest_at_notice
        if gang is None or gang.broken_at <= at:  # what a crash lost is not the notice's
            return
        if gang.finished > max(0, newest[1]) and newest <= before:
            raise Violation(f"{run.name} says saved, step {gang.finished} is lost")


# -- schedules that are built by hand -----------------------------------------------------------


def quiet_world(size: int, *, has_memory: bool = False) -> World:
    """Return a job of all its hosts, 40 steps of 2 s that are saved at the end, in 1 s."""
    world = World(1, size)
    world.nodes = (1, size)
    world.has_memory = has_memory
    world.total_steps, world.step_seconds = 40, 2.0
    world.save_seconds = (0.9, 1.1)
    world.interval_steps, world.interval_seconds = 0, 0.0
    world.grace = 15.0
    return world


def when(world: World, holds: Callable[[], bool], act: Callable[[], None]) -> None:
    """Have something happen as soon as a condition holds."""
    if holds():
        act()
    else:
        world.kernel.after(0.01, lambda: when(world, holds, act))


def is_about_to_seal(run: Run | None) -> bool:
    """Whether all parts of a checkpoint are written, and only its rename is left."""
    attempts = run.world.disk.attempts if run is not None else []
    return any(run is not None and one.owner == run.number and not one.missing for one in attempts)


def is_at_step(world: World, step: int) -> bool:
    """Whether the ranks that were launched last have finished a step."""
    return bool(world.gangs) and world.gangs[-1].finished >= step
