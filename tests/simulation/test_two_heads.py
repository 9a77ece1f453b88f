"""A second run of a job of several nodes, while nodes of the first one still live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from elastic_ckpt.errors import ExitCode
from tests.simulation.faults import outcome
from tests.simulation.run import Run
from tests.simulation.test_simulation import (
    earlier_attempts_stay_where_they_are,
    fence_is_not_checked,
    lease_is_not_waited_out,
)
from tests.simulation.world import World, is_about_to_seal, is_at_step, quiet_world, when

Scenario = Callable[[World], None]


def several_nodes() -> World:
    """Three nodes that save each second step; the second run has two of its own."""
    world = quiet_world(3)
    world.interval_steps = 2
    return world


def run_again(world: World) -> None:
    world.call(world.spare)


def head_is_suspended_at_its_rename(world: World) -> None:
    """It goes on after another run has taken over, and trains."""
    head = world.first.head

    def suspend() -> None:
        world.suspend(head, 45.0)
        run_again(world)

    when(world, lambda: is_about_to_seal(head.run) and is_at_step(world, 4), suspend)


def rename_of_the_head_is_answered_late(world: World) -> None:
    """The storage has its rename, and does it after another run has taken over, and loaded."""
    head = world.first.head

    def cut() -> None:
        head.storage_at = world.kernel.now + 45.0
        run_again(world)

    when(world, lambda: is_about_to_seal(head.run) and is_at_step(world, 4), cut)


def storage_of_the_head_is_cut(world: World) -> None:
    """It trains on with its members, and cannot find out that it was taken over."""

    def cut() -> None:
        world.first.head.storage_at = world.kernel.now + 60.0
        run_again(world)

    when(world, lambda: is_at_step(world, 3), cut)


def lock_is_lost(world: World) -> None:
    """A second head on the same machine gets the lock of one that trains."""

    def lose() -> None:
        world.spare.head.machine = world.first.head.machine
        world.disk.lock_is_lost = True
        run_again(world)

    when(world, lambda: is_at_step(world, 3), lose)


def rendezvous_is_split(world: World) -> None:
    """One member finds the new head, the other one stays with the old head."""

    def split() -> None:
        storage_of_the_head_is_cut(world)
        moved = world.first.hosts[2]
        moved.dials = world.spare.head
        world.network.cuts.add(frozenset((moved.number, world.first.head.number)))
        world.network.changed()

    when(world, lambda: is_at_step(world, 2), split)


def clock_of_the_head_jumps(world: World) -> None:
    """Its beats and its lease do not follow the time of day."""

    def jump() -> None:
        world.first.head.clock.wall_offset -= 1e6
        run_again(world)

    when(world, lambda: is_at_step(world, 3), jump)


def run_through(scenario: Scenario) -> tuple[str | None, World]:
    world = several_nodes()
    scenario(world)
    return outcome(world), world


def ended(world: World) -> list[tuple[str, int]]:
    """Return the names and exit codes of the heads' runs that have ended."""
    return [(run.host.name, int(run.code)) for run in heads(world) if run.code is not None]


def heads(world: World) -> list[Run]:
    return list(dict.fromkeys(gang.run for gang in world.gangs))


@pytest.mark.parametrize(
    "scenario",
    [
        head_is_suspended_at_its_rename,
        rename_of_the_head_is_answered_late,
        storage_of_the_head_is_cut,
        lock_is_lost,
        rendezvous_is_split,
    ],
)
def test_second_run_takes_the_line_over_and_the_first_one_seals_nothing(
    scenario: Scenario,
) -> None:
    error, world = run_through(scenario)
    assert error is None
    assert ended(world)[0] == ("n0", ExitCode.UNAVAILABLE)
    assert world.disk.sealed[world.disk.newest].run == world.disk.number == 2


def test_second_run_seals_what_the_first_one_had_complete() -> None:
    """Its step 4 was written, and is not trained again."""
    error, world = run_through(head_is_suspended_at_its_rename)
    assert error is None
    assert world.disk.sealed[0, 4].run == 1
    assert [gang.start_step for gang in world.gangs] == [0, 4]


def test_split_rendezvous_gives_each_head_its_members() -> None:
    error, world = run_through(rendezvous_is_split)
    assert error is None
    members = {gang.run.host.name: set() for gang in world.gangs}  # type: dict[str, set[str]]
    for gang in world.gangs:
        members[gang.run.host.name] |= {one.agent.run.host.name for one in gang.members}
    assert "n1" in members["n0"] and "n2" in members["n10"]


def test_owner_that_is_well_keeps_the_job_whatever_its_clock_says() -> None:
    error, world = run_through(clock_of_the_head_jumps)
    assert error is None
    assert world.disk.newest == (0, 40) and world.disk.number == 1


@pytest.mark.parametrize(
    ("bug", "scenario", "found"),
    [
        (fence_is_not_checked, storage_of_the_head_is_cut, "run number 2 has loaded"),
        (fence_is_not_checked, lock_is_lost, "run number 2 has loaded"),
        (fence_is_not_checked, rendezvous_is_split, "run number 2 has loaded"),
        (lease_is_not_waited_out, clock_of_the_head_jumps, "which is well"),
        (
            earlier_attempts_stay_where_they_are,
            rename_of_the_head_is_answered_late,
            "run number 2 has loaded",
        ),
    ],
)
def test_bug_is_caught_on_several_nodes(bug: Any, scenario: Scenario, found: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        error, _ = run_through(scenario)
    assert error is not None and found in error


def test_run_from_is_not_overtaken_by_a_head_that_was_suspended_at_its_rename() -> None:
    """That one goes on before the new run's ranks load."""
    world = several_nodes()
    head, spare = world.first.head, world.spare.head

    def suspend() -> None:
        world.suspend(head, 1000.0)
        world.call(world.spare, (0, 2))
        when(world, lambda: spare.is_busy, lambda: world.go_on(head))

    when(world, lambda: is_about_to_seal(head.run) and is_at_step(world, 4), suspend)
    assert outcome(world) is None
    assert [gang.start_step for gang in world.gangs[:2]] == [0, 2]


def test_member_that_reaches_the_head_of_an_earlier_run_shares_its_directory() -> None:
    """It said that the directory was another one, and ended with 64, which nothing restarts."""
    world = several_nodes()
    member = world.first.hosts[1]

    def start_it_again() -> None:
        assert member.run is not None
        member.run.die()
        world.restart(member)

    storage_of_the_head_is_cut(world)
    when(world, lambda: world.disk.number == 2, start_it_again)
    assert outcome(world) is None


def test_member_does_not_call_the_checkpoint_of_another_run_its_own() -> None:
    """Its head cannot reach the storage and does not know; it said 75, and its step was lost."""
    world = several_nodes()
    head, member, codes = world.first.head, world.first.hosts[1], []

    def preempt() -> None:
        first, run = head.run, member.run
        assert first is not None and run is not None
        run.notice("signal", 90.0)
        when(world, lambda: run.code is not None, lambda: codes.append(run.code))
        when(world, lambda: world.disk.newest == (0, 4), first.die)

    storage_of_the_head_is_cut(world)
    when(world, lambda: world.disk.number == 2, preempt)
    assert outcome(world) is None
    assert codes == [ExitCode.PREEMPTED_UNSAVED]


def test_run_that_was_taken_over_does_not_call_the_job_done() -> None:
    """The other one has gone back to an older checkpoint, between the last seal and the end."""
    world = several_nodes()
    head, codes = world.first.head, []

    def go_back() -> None:
        first = head.run
        assert first is not None
        world.spare.head.machine, world.disk.lock_is_lost = head.machine, True
        world.start(world.spare.head, (0, 38))
        world.spare.is_called = True
        world.start(world.spare.hosts[1])
        when(world, lambda: first.code is not None, lambda: codes.append(first.code))

    when(world, lambda: world.disk.newest == (0, 40), go_back)
    assert outcome(world) is None
    assert codes == [ExitCode.UNAVAILABLE]


@pytest.mark.parametrize("seconds", [3.0, 60.0], ids=["answers late", "does not answer"])
def test_member_that_leaves_does_not_call_the_job_of_a_former_head_done(seconds: float) -> None:
    """Its ranks had finished during the notice; the other run has gone back meanwhile."""
    world = several_nodes()
    head, member, codes = world.first.head, world.first.hosts[1], []

    def preempt() -> None:
        assert member.run is not None
        member.run.notice("signal", 90.0)

    def go_back() -> None:
        run = member.run
        assert run is not None
        member.storage_at = world.kernel.now + seconds
        world.spare.head.machine, world.disk.lock_is_lost = head.machine, True
        world.start(world.spare.head, (0, 38))
        world.spare.is_called = True
        world.start(world.spare.hosts[1])
        when(world, lambda: run.code is not None, lambda: codes.append(run.code))

    when(world, lambda: is_at_step(world, 40), preempt)
    when(world, lambda: world.disk.newest == (0, 40), go_back)
    assert outcome(world) is None
    assert codes == [ExitCode.PREEMPTED_UNSAVED]


def test_run_that_was_taken_over_does_not_call_the_others_checkpoint_its_own() -> None:
    """A notice reaches it before its next beat: it said 75, for steps that were lost."""
    world = quiet_world(1)
    head, spare = world.first.head, world.spare.head
    codes = []

    def suspend() -> None:
        world.suspend(head, 1000.0)
        run_again(world)
        when(world, lambda: spare.is_busy, interrupt)

    def interrupt() -> None:
        assert head.run is not None
        head.run.notice("signal", 300.0)
        head.run.stop_now()
        world.disk.requested = True
        when(world, lambda: bool(world.disk.sealed), go_on)

    def go_on() -> None:
        first = head.run
        assert first is not None
        world.go_on(head)
        when(world, lambda: first.code is not None, lambda: codes.append(first.code))

    when(world, lambda: is_at_step(world, 3), suspend)
    assert outcome(world) is None
    assert codes == [ExitCode.UNAVAILABLE]
