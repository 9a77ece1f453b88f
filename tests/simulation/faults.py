"""What goes wrong in a schedule, drawn from its seed."""

from __future__ import annotations

from collections.abc import Callable

from elastic_ckpt.policy.deadline import EarlyWarning
from tests.simulation.hosts import Host
from tests.simulation.kernel import Violation
from tests.simulation.world import World

LAST_SECONDS = 90.0
"""No fault begins after this."""


def draw_faults(world: World) -> None:
    """Put up to five faults into the world's future."""
    kernel = world.kernel
    for _ in range(kernel.random.choice((0, 1, 1, 2, 2, 3, 4, 5))):
        fault = kernel.random.choice(FAULTS)
        host = kernel.random.choice(world.hosts)
        at = kernel.between(0.0, LAST_SECONDS * kernel.random.random())
        kernel.after(at, lambda fault=fault, host=host: _strike(world, fault, host))
    if kernel.chance(0.1):
        world.deadly_step = kernel.random.randint(1, world.total_steps)
        world.deaths_left = kernel.random.choice((1, 2))


def _strike(world: World, fault: Callable[[World, Host], None], host: Host) -> None:
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
    host.memory.generations.clear()
    if (
        host.number == 0
        or world.nodes[0] >= sum(not one.is_down for one in world.hosts) + 1
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


def pause(world: World, host: Host) -> None:
    """The virtual machine is suspended for a while; what it was doing goes on after that."""
    run = host.run
    if world.size == 1 and run is not None and not run.is_gone and run.deadline == float("inf"):
        host.paused_until = world.kernel.now + world.kernel.between(1.0, 60.0)


def second_run(world: World, host: Host) -> None:
    """Another host runs the same job, as a requeue does that gave the first one up."""
    if world.size == 1:
        world.start(world.spare)


def pause_and_run_again(world: World, host: Host) -> None:
    """Both: the late writer."""
    pause(world, host)
    second_run(world, host)


def set_clocks(world: World, host: Host) -> None:
    """Each host's time of day jumps; no decision may depend on it."""
    for one in (*world.hosts, world.spare):
        one.clock.wall_offset += world.kernel.between(-1e7, 1e7)


FAULTS = (
    crash, crash, hang, kill_agent, kill_supervisor, lose_power, preempt_by_signal,
    preempt_by_signal, preempt_in_evaluation, preempt_by_platform, preempt_twice, interrupt_twice,
    warn, ask_for_a_save, fill_disk, fill_memory, freeze_disk, cut_link,
    pause, second_run, pause_and_run_again, set_clocks,
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
        ends = run.decided_at and run.decided_at < noticed and world.disk.answers_at > noticed
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
        host.memory.generations.clear()
        _come_back(world, host)

    world.kernel.after(grace, take)


def _come_back(world: World, host: Host) -> None:
    def back() -> None:
        host.is_down = False
        world.network.changed()
        world.restart(host, 0.5, 2.0)

    world.kernel.after(world.kernel.between(1.0, 30.0), back)
