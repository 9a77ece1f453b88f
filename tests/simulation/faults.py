"""What goes wrong in a schedule, and all of one, drawn from its seed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from elastic_ckpt.policy.deadline import EarlyWarning
from tests.simulation.hosts import Host
from tests.simulation.kernel import Violation
from tests.simulation.world import World

logging.getLogger("elastic_ckpt").setLevel(logging.CRITICAL)

LAST_SECONDS = 90.0
"""No fault begins after this."""


def simulate(seed: int, log: list[str] | None = None) -> str | None:
    """Run the schedule of a seed; return the violated invariant, None if all hold.

    Args:
        log: gets a line for each thing that happens.
    """
    world = World(seed)
    world.kernel.log = log
    draw_faults(world)
    return outcome(world)


def outcome(world: World) -> str | None:
    """Run a world to its end; return the violated invariant, None if all hold."""
    world.begin()
    try:
        world.go()
    except Violation as error:
        return f"{error} (at {world.kernel.now:.2f} s)"
    return None


def draw_faults(world: World) -> None:
    """Put up to five faults into the world's future."""
    kernel = world.kernel
    for _ in range(kernel.random.choice((0, 1, 1, 2, 2, 3, 4, 5))):
        fault = kernel.random.choice(FAULTS)
        number, of_spare = kernel.random.randrange(world.size), kernel.chance(0.3)
        at = kernel.between(0.0, LAST_SECONDS * kernel.random.random())
        act = partial(strike, world, fault, number, of_spare=of_spare)
        kernel.after(at, act)
    if kernel.chance(0.3):
        world.spare.head.machine = world.first.head.machine
    if kernel.chance(0.1):
        world.deadly_step = kernel.random.randint(1, world.total_steps)
        world.deaths_left = kernel.random.choice((1, 2))


def strike(
    world: World, fault: Callable[[World, Host], None], number: int, *, of_spare: bool = False
) -> None:
    """Have a fault happen to a host now, to one of the second team if that is there."""
    spare = world.spare.hosts[number % len(world.spare.hosts)]
    host = spare if of_spare and spare.is_busy else world.hosts[number]
    if not world.has_finished:
        world.kernel.say(f"fault: {fault.__name__} on {host.name}")
        fault(world, host)


def crash(world: World, host: Host) -> None:
    """A rank dies by a signal."""
    agent = host.run.agent if host.run else None
    if agent is not None and not agent.is_dead and agent.workers.busy:
        world.count_failure()
        agent.workers.fail(-9)


def hang(world: World, host: Host) -> None:
    """A rank stops in its step, and never comes back."""
    agent = host.run.agent if host.run else None
    slot = agent.workers.board.slot if agent else None
    if agent is not None and slot is not None and slot.finished > slot.start_step >= 0:
        world.count_failure()
        agent.workers.hangs = True


def kill_agent(world: World, host: Host) -> None:
    """SIGKILL of an agent."""
    if host.run is not None and host.run.agent is not None:
        world.count_failure()
        host.run.agent.die()


def kill_supervisor(world: World, host: Host) -> None:
    """SIGKILL of a supervisor; a service manager starts it again."""
    if host.run is not None and not host.run.is_gone:
        host.run.die()
        world.restart(host)


def lose_power(world: World, host: Host) -> None:
    """The node vanishes with its memory; it comes back, unless the job can do without it."""
    host.is_down = True
    world.network.changed()
    if host.run is not None:
        host.run.die()
    host.lose_memory()
    if (
        host.leads
        or world.nodes[0] >= sum(not one.is_down for one in host.team.hosts) + 1
        or world.kernel.chance(0.5)
    ):
        _come_back(world, host)
    else:
        world.kernel.say(f"{host.name} is gone for good")


def preempt_by_signal(world: World, host: Host) -> None:
    """SIGTERM, and the node goes at the end of the grace."""
    _preempt(world, host, "signal", world.grace)


def preempt_in_evaluation(world: World, host: Host, tries: int = 60) -> None:
    """SIGTERM with a snapshot in memory only, while a rank evaluates for longer than the grace."""
    run = host.run
    if run is None or run.agent is None or not run.agent.workers.busy:
        return
    if run.tier.root and run.tier.not_on_disk() is None and tries:
        world.kernel.after(0.25, lambda: preempt_in_evaluation(world, host, tries - 1))
        return
    grace = world.kernel.random.choice((world.grace, 30.0))
    run.agent.workers.evaluates_until = world.kernel.now + grace + 5.0
    later = world.kernel.between(0.0, 1.0)
    world.kernel.after(later, lambda: _preempt(world, host, "signal", grace))


def preempt_by_platform(world: World, host: Host) -> None:
    """A cloud's notice, with a deadline of its own."""
    _preempt(world, host, "cloud", world.kernel.between(6.0, 60.0))


def preempt_twice(world: World, host: Host) -> None:
    """A signal whose grace is a guess, then the platform's deadline."""
    _preempt(world, host, "signal", 60.0, is_guess=True)
    run = host.run
    soon, deadline = world.kernel.between(0.0, 2.0), world.kernel.between(8.0, 40.0)

    def second() -> None:
        if run is not None and run is host.run and not run.is_gone and not host.is_down:
            run.notice("cloud", deadline)
            run.deadline = min(run.deadline, run.host.clock.monotonic() + deadline)

    world.kernel.after(soon, second)


def interrupt_twice(world: World, host: Host) -> None:
    """Ctrl-C, and again: the user does not want to wait, and reruns it later."""
    run = host.run
    if run is not None and not run.is_gone:
        run.notice("signal", 300.0)
        world.kernel.after(world.kernel.between(0.1, 2.0), run.stop_now)


def warn(world: World, host: Host) -> None:
    """A node may go away some time."""
    if host.run is not None and not host.run.is_gone:
        host.run.cloud.report(EarlyWarning("cloud", "rebalance"))


def ask_for_a_save(world: World, host: Host) -> None:
    """``elastic-ckpt save``."""
    world.disk.requested = True


def fill_disk(world: World, host: Host) -> None:
    """Nothing can be written for a while."""
    world.disk.full_until = world.kernel.now + world.kernel.between(1.0, 40.0)


def fill_memory(world: World, host: Host) -> None:
    """Another process takes what is left of the memory for a while."""
    host.memory.full_until = world.kernel.now + world.kernel.between(5.0, 60.0)


def freeze_disk(world: World, host: Host) -> None:
    """The file server does not answer for a while."""
    world.disk.answers_at = world.kernel.now + world.kernel.between(0.5, 40.0)


def cut_link(world: World, host: Host) -> None:
    """A host reaches no other for a while, and lives."""
    host.is_cut = True
    world.network.changed()

    def heal() -> None:
        host.is_cut = False
        world.network.changed()

    world.kernel.after(world.kernel.between(0.3, 12.0), heal)


def cut_pair(world: World, host: Host) -> None:
    """Two hosts do not reach each other for a while; both reach all others."""
    _part(world, host, world.kernel.random.choice(world.all_hosts))


def cut_storage(world: World, host: Host) -> None:
    """The disk does not answer to one host for a while."""
    host.storage_at = world.kernel.now + world.kernel.between(0.5, 60.0)


def pause(world: World, host: Host) -> None:
    """The virtual machine is suspended for a while; what it was doing goes on after that."""
    _suspend(world, host, 1.0, 60.0)


def lose_lock(world: World, host: Host) -> None:
    """The server has forgotten the owner's lock, which does not know."""
    world.disk.lock_is_lost = True


def second_run(world: World, host: Host) -> None:
    """Other hosts run the same job, as a requeue does that gave the first ones up."""
    world.call(world.spare)


def second_run_from(world: World, host: Host) -> None:
    """As ``second_run``, from an older checkpoint."""
    keys = sorted(world.disk.sealed)
    world.call(world.spare, world.kernel.random.choice(keys) if keys else None)


def pause_and_run_again(world: World, host: Host) -> None:
    """Both: the late writer."""
    pause(world, host.team.head)
    _run_again(world, host)


def stop_at_the_rename(world: World, host: Host, tries: int = 200) -> None:
    """The head, or only its storage, stops when it has checked its number and is about to seal."""
    run, head = host.team.head.run, host.team.head
    complete = run is not None and any(
        one.owner == run.number and not one.missing for one in world.disk.attempts
    )
    if complete:
        if world.kernel.chance(0.5):
            _suspend(world, head, 25.0, 60.0)
        else:
            head.storage_at = world.kernel.now + world.kernel.between(25.0, 60.0)
        _run_again(world, host)
    elif tries:
        again = partial(stop_at_the_rename, world, host, tries - 1)
        world.kernel.after(0.15, again)


def cut_storage_and_run_again(world: World, host: Host) -> None:
    """The first head trains on, and can neither beat nor find out."""
    cut_storage(world, host.team.head)
    _run_again(world, host)


def lose_lock_and_run_again(world: World, host: Host) -> None:
    """A second container of the same machine gets the lock, while the first one trains."""
    world.spare.head.machine = world.first.head.machine
    lose_lock(world, host)
    _run_again(world, host)


def lose_head_and_run_again(world: World, host: Host) -> None:
    """The head's node dies; its members wait for it, and others are started instead."""
    lose_power(world, host.team.head)
    _run_again(world, host)


def split_rendezvous(world: World, host: Host) -> None:
    """The name where the nodes meet leads some of them to another head; the first one goes on."""
    kernel, first = world.kernel, world.first
    kernel.random.choice((pause, cut_storage, cut_storage, lose_lock))(world, first.head)
    if kernel.chance(0.5):
        world.spare.head.machine = first.head.machine
    _run_again(world, host)
    for one in first.hosts[1:]:
        if kernel.chance(0.5):
            one.dials = world.spare.head
            _part(world, one, first.head)
    kernel.after(kernel.between(10.0, 60.0), lambda: first.call_to(first.head))


def set_clocks(world: World, host: Host) -> None:
    """Each host's time of day jumps; no decision may depend on it."""
    for one in world.all_hosts:
        set_clock(world, one)


def set_clock(world: World, host: Host) -> None:
    """One host's time of day jumps."""
    host.clock.wall_offset += world.kernel.between(-1e7, 1e7)


FAULTS = (
    crash, crash, hang, kill_agent, kill_supervisor, lose_power, preempt_by_signal,
    preempt_by_signal, preempt_in_evaluation, preempt_by_platform, preempt_twice, interrupt_twice,
    warn, ask_for_a_save, fill_disk, fill_memory, freeze_disk, cut_link, cut_pair, cut_storage,
    pause, second_run, second_run_from, pause_and_run_again, stop_at_the_rename,
    cut_storage_and_run_again,
    lose_lock, lose_lock_and_run_again, lose_head_and_run_again, split_rendezvous,
    set_clocks, set_clock,
)  # fmt: skip


def _preempt(
    world: World, host: Host, source: str, grace: float, *, is_guess: bool = False
) -> None:
    run = host.run
    if run is None or run.is_gone or host.is_down:
        return
    run.notice(source, grace, is_guess=is_guess)
    run.deadline = min(run.deadline, run.host.clock.monotonic() + grace)
    noticed = world.kernel.now

    def take() -> None:
        if host.is_down:
            return
        # One that ends already, and waits for a storage that hangs, learns of a notice only then.
        answers = world.disk.answers(host)
        ends = run.decided_at and run.decided_at < noticed and answers > noticed
        noted = run.supervisor.preemption.notice is not None
        if (
            host.run is run
            and not run.is_gone
            and noted
            and not ends
            and host.paused_until < noticed
        ):
            raise Violation(f"{run.name} is still there at its deadline")
        host.is_down = True
        world.network.changed()
        if host.run is not None:
            host.run.die()
        host.lose_memory()
        _come_back(world, host)

    world.kernel.after(grace, take)


def _run_again(world: World, host: Host) -> None:
    act = world.kernel.random.choice((second_run, second_run, second_run_from))
    world.kernel.after(world.kernel.between(0.0, 10.0), lambda: act(world, host))


def _suspend(world: World, host: Host, low: float, high: float) -> None:
    run = host.run
    if run is not None and not run.is_gone and run.deadline == float("inf"):
        world.suspend(host, world.kernel.between(low, high))


def _part(world: World, one: Host, other: Host) -> None:
    pair = frozenset((one.number, other.number))
    world.network.cuts.add(pair)
    world.network.changed()

    def heal() -> None:
        world.network.cuts.discard(pair)
        world.network.changed()

    world.kernel.after(world.kernel.between(0.3, 60.0), heal)


def _come_back(world: World, host: Host) -> None:
    def back() -> None:
        host.is_down = False
        world.network.changed()
        world.restart(host, 0.5, 2.0)

    world.kernel.after(world.kernel.between(1.0, 30.0), back)
