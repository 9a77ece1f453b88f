"""Jobs of several nodes that are lost, one or two at once: ``python -m tests.simulation.losses 7``.

Saves go into the nodes' memory, with replicas, and another node takes the place of a head that is
lost. Beside the invariants of every schedule (``world.py``): what was sealed in memory is loaded
again, unless a share of it was lost with all its replicas; a loss that the replicas are meant for
loses no step that had the time to be replicated; and a head that is well keeps the job. With two
numbers it tries all seeds between them.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from elastic_ckpt.errors import ExitCode
from elastic_ckpt.policy.lease import HEAD_BEAT_SECONDS, SURVIVOR_LEASE_SECONDS
from elastic_ckpt.protocol.succession import Follow, Lead, Leader
from elastic_ckpt.supervisor.ports import Key
from tests.simulation.disk import Checkpoint
from tests.simulation.faults import cut_link, outcome, preempt_by_signal
from tests.simulation.gang import Gang
from tests.simulation.hosts import Host
from tests.simulation.kernel import Violation
from tests.simulation.run import Part, Run
from tests.simulation.shared_memory import REPLICATED_SECONDS, SealedSave, SharedMemory
from tests.simulation.world import World

LAST_SECONDS = 60.0
"""No fault begins after this."""

MISSED_BEATS = 2.5
"""As in ``cli/run/node_run.py``."""

LOOK_SECONDS = 0.01


@dataclass
class Promise:
    """What the next ranks must have, if all of these hosts are among theirs with their memory.

    Attributes:
        survivors: with their ``power``.
    """

    save: SealedSave
    survivors: dict[Host, int]
    why: str

    def holds(self, here: frozenset[Host]) -> bool:
        return all(host in here and host.power == power for host, power in self.survivors.items())


class LossWorld(World):
    """A job whose hosts are lost.

    Attributes:
        losses: how often 1, 2 ... hosts were lost at once.
        kept: how often a promise was looked at, and kept, by its reason.
    """

    beat_seconds = HEAD_BEAT_SECONDS
    shared_memory: SharedMemory

    def __init__(self, seed: int) -> None:
        super().__init__(seed, 3 + seed % 4)
        kernel, draw = self.kernel, self.kernel.random
        self.has_memory = False  # of one host alone
        self.disk.has_branches = True
        self.nodes = (draw.randint(1, self.size - 1), self.size)
        self.total_steps, self.step_seconds = draw.randint(60, 150), kernel.between(0.3, 1.0)
        self.save_seconds = (0.2, 2.0)
        self.interval_steps, self.interval_seconds = draw.choice((3, 6, 10)), 0.0
        self.grace = 10.0
        self.shared_memory = SharedMemory(
            self, draw.choice((0, 1, 1, 1, 2)), drain_seconds=draw.choice((1.0, 5.0, 20.0)),
            hands_over=bool(seed % 2),
        )  # fmt: skip
        domains = draw.choice((0, 2, 2, 3))
        for host in self.hosts:
            host.domain = f"d{host.number % domains}" if domains else ""
        self.endpoint = f"{self.first.head.name}:1"
        self.calm_since = 0.0
        self.promise: Promise | None = None
        self.losses: Counter[int] = Counter()
        self.kept: Counter[str] = Counter()

    # -- who leads ------------------------------------------------------------------------------

    def leader(self, host: Host) -> Leader | None:
        owner = self.disk.owner
        if owner is None or self.disk.hangs(host) or host.is_paused:
            return None
        return Leader(
            owner.number, owner.host.name, owner.part.endpoint, str(owner.beats).encode(),
            ended=owner.has_ended, passed_on=owner.passed_on,
        )  # fmt: skip

    def dialled(self, run: Run) -> Host:
        name = run.part.endpoint.partition(":")[0]
        return next(host for host in self.hosts if host.name == name)

    def start(self, host: Host, start_from: Key | None = None) -> None:
        """As ``NodeRun.begin``: it joins a head that leads elsewhere by now."""
        first = self.leader(host)
        if first is None or first.ended or first.endpoint == self.endpoint:
            self._start(host, None)
        else:
            self.kernel.after(MISSED_BEATS * HEAD_BEAT_SECONDS, lambda: self._start(host, first))

    def _start(self, host: Host, first: Leader | None) -> None:
        if self.has_finished or host.is_down or host.is_busy or host.is_claiming:
            return
        found = self.leader(host)
        if first is not None and found not in (None, first) and not found.ended:
            self._begin(host, part=Part(leads=False, endpoint=found.endpoint))
        elif host.leads:
            host.is_claiming = True
            self._claim(host, None, None)
        else:
            self._begin(host, part=Part(leads=False, endpoint=self.endpoint))

    def _begin(self, host: Host, start_from: Key | None = None, part: Part | None = None) -> None:
        super()._begin(host, start_from, part or Part(leads=True, endpoint=self.endpoint))
        seconds = 1.0 if self.shared_memory.hands_over else 0.0
        if host.run is not None:  # nothing is measured here
            host.run.supervisor.saves.hand_over_seconds = lambda nodes, grace: seconds

    def change_part(self, run: Run) -> None:
        """As ``NodeRun.go_on``."""
        step = run.supervisor.goes_on
        if isinstance(step, Lead):
            self._check_lead(run)
        run.is_gone = True
        run.host.passed_on = run if run.supervisor.role.is_passed_on else None
        if run.agent is not None:
            run.agent.die()
        self.network.changed()
        follows = Part(leads=False, endpoint=run.part.endpoint, place=run.supervisor.role.place)

        def go_on() -> None:
            if run.host.is_down or run.host.is_busy or self.has_finished:
                return
            part = follows
            if isinstance(step, Follow):
                part = Part(leads=False, endpoint=step.leader.endpoint, place=follows.place)
            elif self.disk.number == step.leader.number:
                name = f"{run.host.name}:1"
                part = Part(leads=True, endpoint=name, place=follows.place, taken=step.leader)
            self._begin(run.host, part=part)

        run.host.after(self.kernel.between(0.01, 0.2), go_on)

    def _check_lead(self, run: Run) -> None:
        """The head may be well again a moment after it was judged."""
        owner = self.disk.owner
        is_well = owner is not None and not (owner.is_gone or owner.has_ended)
        if is_well and self.kernel.now - owner.beat_at < SURVIVOR_LEASE_SECONDS - LOOK_SECONDS:
            raise Violation(f"{run.host.name} takes the job from {owner.name}, which is well")

    def on_exit(self, run: Run) -> None:
        kept = run.tier.handed_over
        if run.code is ExitCode.PREEMPTED_SAVED and kept is not None:
            if not self.shared_memory.is_kept_elsewhere(run.host, kept[0]):
                raise Violation(f"{run.name} says that {kept[1]} has step {kept[0][1]}, and lies")
            self.kept["handed over by the head" if run.leads else "handed over"] += 1
        super().on_exit(run)

    # -- what must not be lost ------------------------------------------------------------------

    def is_lost_with(self, lost: Sequence[Host]) -> None:
        """Hosts are about to lose their memory: note what must be left."""
        save = next(filter(self._is_replicated, reversed(self.shared_memory.saves[-2:])), None)
        self.promise = None
        if save is None:
            return
        owners = frozenset(host for found in save.copies.values() for host, _ in found[:1])
        survivors, replicas = owners - frozenset(lost), self.shared_memory.replicas
        domains = Counter(host.domain for host in owners)
        gone = {host.domain for host in owners - survivors}
        why = ""
        if len(owners - survivors) <= replicas:
            why = f"{len(lost)} lost, {replicas} replicas"
        elif replicas and len(gone) == 1 and max(domains.values()) * 2 <= len(owners):
            why = "a domain lost"
        if why and survivors:
            self.promise = Promise(save, {host: host.power for host in survivors}, why)

    def _is_replicated(self, save: SealedSave) -> bool:
        """Whether a checkpoint had the time for that, and is one of the two that nodes hold."""
        if save.is_handed_over:
            return False
        had_time = self.calm_since < save.at < self.kernel.now - REPLICATED_SECONDS
        return had_time and all(
            any(held.checkpoint is save.checkpoint for held in found[0][0].shares)
            for found in save.copies.values()
        )

    def load(self, gang: Gang) -> Checkpoint | None:
        found = super().load(gang)
        key = found.key if found is not None else (0, 0)
        here = frozenset(one.agent.run.host for one in gang.members)
        newest, promise = self.shared_memory.newest, self.promise
        self.promise = None
        if newest is not None and newest.survives(here):
            self._check_loaded(gang.run, newest.checkpoint, key, "in memory")
        if promise is not None and promise.holds(here):
            self._check_loaded(gang.run, promise.save.checkpoint, key, promise.why)
            self.kept[promise.why] += 1
        return found

    def _check_loaded(self, run: Run, one: Checkpoint, key: Key, why: str) -> None:
        """Nothing older is loaded than what is there, unless the job has gone on without that."""
        if one.key > key and not self.disk.is_off_the_line(one, run):
            raise Violation(f"{why}, and step {one.key[1]} is lost: {key[1]} is loaded")


# -- faults ---------------------------------------------------------------------------------------


def lose(world: LossWorld, hosts: Sequence[Host]) -> None:
    """Hosts vanish with their memory at the same moment, and come back later."""
    lost = [host for host in hosts if not host.is_down]
    if not lost:
        return
    world.kernel.say(f"lost at once: {', '.join(host.name for host in lost)}")
    world.losses[len(lost)] += 1
    world.is_lost_with(lost)
    for host in lost:
        host.is_down = True
        host.lose_memory()
    world.network.changed()
    for host in lost:
        if host.run is not None:
            host.run.die()
        world.kernel.after(world.kernel.between(1.0, 40.0), partial(_come_back, world, host))
    world.calm_since = world.kernel.now


def lose_one(world: LossWorld) -> None:
    lose(world, [world.kernel.random.choice(world.hosts)])


def lose_the_head(world: LossWorld) -> None:
    owner = world.disk.owner
    lose(world, [owner.host if owner is not None else world.first.head])


def lose_two(world: LossWorld) -> None:
    lose(world, world.kernel.random.sample(world.hosts, 2))


def lose_the_head_and_another(world: LossWorld) -> None:
    owner = world.disk.owner
    head = owner.host if owner is not None else world.first.head
    others = [host for host in world.hosts if host is not head]
    lose(world, [head, world.kernel.random.choice(others)])


def lose_a_domain(world: LossWorld) -> None:
    domain = world.kernel.random.choice(world.hosts).domain
    found = [host for host in world.hosts if host.domain == domain]
    lose(world, found if domain else found[:1])


def suspend_the_head(world: LossWorld) -> None:
    """It goes on after another node has taken over, perhaps."""
    owner, seconds = world.disk.owner, world.kernel.between(2.0, 40.0)
    if owner is not None and not owner.is_gone:
        world.suspend(owner.host, seconds)
        world.calm_since = world.kernel.now + seconds


def cut_the_head_off(world: LossWorld) -> None:
    if world.disk.owner is not None:
        cut_link(world, world.disk.owner.host)
        world.calm_since = world.kernel.now + 12.0


def preempt(world: LossWorld) -> None:
    preempt_by_signal(world, world.kernel.random.choice(world.hosts))
    world.calm_since = world.kernel.now + world.grace


def preempt_another(world: LossWorld) -> None:
    owner = world.disk.owner
    others = [host for host in world.hosts if owner is None or host is not owner.host]
    preempt_by_signal(world, world.kernel.random.choice(others))
    world.calm_since = world.kernel.now + world.grace


def preempt_the_head(world: LossWorld) -> None:
    owner = world.disk.owner
    preempt_by_signal(world, owner.host if owner is not None else world.first.head)
    world.calm_since = world.kernel.now + world.grace


def preempt_the_head_and_lose_another(world: LossWorld) -> None:
    """While the job is between two heads, or just after."""
    preempt_the_head(world)
    world.kernel.after(world.kernel.between(0.5, 12.0), partial(lose_one, world))


def preempt_two(world: LossWorld) -> None:
    for host in world.kernel.random.sample(world.hosts, 2):
        later = world.kernel.between(0.0, 2.0)
        world.kernel.after(later, partial(preempt_by_signal, world, host))
    world.calm_since = world.kernel.now + world.grace + 2.0


FAULTS: list[Callable[[LossWorld], None]] = [
    lose_one, lose_one, lose_the_head, lose_two, lose_two, lose_the_head_and_another,
    lose_a_domain, lose_a_domain, suspend_the_head, suspend_the_head, cut_the_head_off, preempt,
    preempt_another, preempt_another, preempt_two, preempt_the_head, preempt_the_head,
    preempt_the_head_and_lose_another,
]  # fmt: skip


def simulate_losses(seed: int, log: list[str] | None = None) -> tuple[str | None, LossWorld]:
    """Run the schedule of a seed; return the violated invariant, if any, and the world."""
    world = LossWorld(seed)
    world.kernel.log = log
    for _ in range(world.kernel.random.choice((1, 2, 3, 4))):
        fault = world.kernel.random.choice(FAULTS)
        at = world.kernel.between(12.0, LAST_SECONDS)
        world.kernel.after(at, partial(_strike, world, fault))
    return outcome(world), world


def _strike(world: LossWorld, fault: Callable[[LossWorld], None]) -> None:
    if not world.has_finished:
        world.kernel.say(f"fault: {fault.__name__}")
        fault(world)


def _come_back(world: LossWorld, host: Host) -> None:
    host.is_down = False
    world.network.changed()
    world.restart(host, 0.5, 2.0)


def main() -> None:
    first, last = int(sys.argv[1]), int(sys.argv[-1])
    began, failed = time.perf_counter(), 0
    losses, kept, handed_over = Counter[int](), Counter[str](), 0
    for seed in range(first, last + 1):
        log: list[str] | None = [] if first == last else None
        error, world = simulate_losses(seed, log)
        losses, kept = losses + world.losses, kept + world.kept
        handed_over += world.shared_memory.handed_over
        print(*log or (), sep="\n", end="\n" if log else "")
        if error is not None:
            failed += 1
            print(f"seed {seed}: {error}", flush=True)
    seconds = time.perf_counter() - began
    print(f"{last - first + 1} jobs in {seconds:.1f} s, {failed} failed; hosts lost at once:")
    print(*(f"{times:6} times {count}" for count, times in sorted(losses.items())), sep="\n")
    print(f"{handed_over:6} shares handed over to nodes that stay")
    print("no step lost where none may be:")
    print(*(f"{times:6} {why}" for why, times in sorted(kept.items())), sep="\n")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
