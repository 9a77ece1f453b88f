"""Whole jobs in virtual time: all invariants hold, and each of some known bugs breaks one."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable

import pytest

from elastic_ckpt.checkpoint.ownership.fence import Fence
from elastic_ckpt.errors import ExitCode
from elastic_ckpt.policy import restart
from elastic_ckpt.policy.deadline import EarlyWarning
from elastic_ckpt.policy.drain_plan import DrainPlan
from elastic_ckpt.policy.failure import FailureClass
from elastic_ckpt.policy.lease import LeaseWatch, Verdict
from elastic_ckpt.protocol import cluster, run_state
from elastic_ckpt.protocol.ended import Ended, EndKind
from elastic_ckpt.protocol.run_state import Event, RunState
from elastic_ckpt.supervisor.cluster.role import Role
from elastic_ckpt.supervisor.preemption import Preemption
from elastic_ckpt.supervisor.saves import emergency
from elastic_ckpt.supervisor.shutdown import Shutdown
from elastic_ckpt.supervisor.supervisor import Supervisor
from tests.simulation.bucket_copies import SimMirror
from tests.simulation.faults import outcome, simulate
from tests.simulation.run import Run
from tests.simulation.storage import Directory
from tests.simulation.world import World, is_at_step, quiet_world, when

SCHEDULES = int(os.environ.get("ELASTIC_CKPT_SCHEDULES", "600"))
"""``make simulate`` runs 10,000."""

PART = 100
UNCAUGHT = 2000
"""A bug that this number of schedules does not find counts as unnoticed."""


@pytest.mark.parametrize("first", range(1, SCHEDULES + 1, PART))
def test_every_invariant_holds_whatever_goes_wrong(first: int) -> None:
    found = {seed: simulate(seed) for seed in range(first, first + PART)}
    wrong = {seed: error for seed, error in found.items() if error is not None}
    assert not wrong, f"replay with: python -m tests.simulation {min(wrong)}"


@pytest.mark.parametrize("seed", [3, 7, 2352])
def test_seed_replays_the_same_schedule(seed: int) -> None:
    logs: list[list[str]] = [[], []]
    for log in logs:
        simulate(seed, log)
    assert logs[0] == logs[1]
    assert len(logs[0]) > 5


def code_and_seconds(world: World, act: Callable[[Run], None], step: int) -> tuple[int, float]:
    """Do something to the first run at a step; return how it ended, and how long after that."""
    ended: list[tuple[int, float]] = []

    def strike() -> None:
        run, at = world.hosts[0].run, world.kernel.now
        assert run is not None
        act(run)

        def note() -> None:
            assert run.code is not None
            ended.append((int(run.code), world.kernel.now - at))

        when(world, lambda: run.code is not None, note)

    when(world, lambda: is_at_step(world, step), strike)
    assert outcome(world) is None
    return ended[0]


def test_storage_that_hangs_is_not_waited_for_beyond_the_deadline() -> None:
    world = quiet_world(1)

    def hang_and_preempt(run: Run) -> None:
        world.disk.answers_at = world.kernel.now + 100.0
        run.notice("signal", 15.0)

    code, seconds = code_and_seconds(world, hang_and_preempt, 3)
    assert code == ExitCode.PREEMPTED_UNSAVED and seconds <= 15.0


def test_second_ctrl_c_does_not_wait_for_a_storage_that_hangs() -> None:
    world = quiet_world(1)

    def hang_and_interrupt(run: Run) -> None:
        world.disk.answers_at = world.kernel.now + 100.0
        run.notice("signal", 300.0)
        run.stop_now()

    code, seconds = code_and_seconds(world, hang_and_interrupt, 3)
    assert code == ExitCode.PREEMPTED_UNSAVED and seconds < 2.0


def steps_sealed(warned: int | None) -> set[int]:
    """Return the steps that two nodes seal, one of which gets an early warning."""
    world = quiet_world(2)
    world.total_steps = 12
    world.begin()

    def warn() -> None:
        run = world.hosts[warned or 0].run
        assert run is not None and run.leads is (warned == 0)
        run.cloud.report(EarlyWarning("cloud", "rebalance"))
        run.wake(0.0)

    if warned is not None:
        world.kernel.after(20.0, warn)
    world.go()
    return {step for _, step in world.disk.sealed}


@pytest.mark.parametrize("warned", [0, 1])
def test_early_warning_of_any_node_leads_to_a_save(warned: int) -> None:
    """A member does not save by itself: it leaves a request, which the head serves."""
    assert steps_sealed(None) == {12}
    early, last = sorted(steps_sealed(warned))
    assert 0 < early < last == 12


# -- bugs put in ------------------------------------------------------------------------------


def deadline_is_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Preemption, "left", lambda self, now: math.inf)


def crash_during_a_notice_restarts(patch: pytest.MonkeyPatch) -> None:
    changed = {**run_state.TRANSITIONS, (RunState.DRAINING, Event.CRASH): RunState.BACKING_OFF}
    patch.setattr(run_state, "TRANSITIONS", changed)


def lost_node_is_charged(patch: pytest.MonkeyPatch) -> None:
    charged = dataclasses.replace(restart.RULES[FailureClass.MEMBERSHIP], counts=True)
    patch.setattr(restart, "RULES", {**restart.RULES, FailureClass.MEMBERSHIP: charged})


def finished_before_the_memory_is_drained(patch: pytest.MonkeyPatch) -> None:
    def follow_up(self: Role, run: Supervisor, ended: Ended) -> None:
        if ended.kind is EndKind.COMPLETED:
            run.record.move(Event.COMPLETED, "finished", exit_code=int(ExitCode.FINISHED))
        else:
            run.incarnations.follow_up(ended)

    patch.setattr(Role, "follow_up", follow_up)


def silent_node_is_waited_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cluster, "LOST_SECONDS", 1e9)


def nodes_stop_at_the_earliest_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cluster, "answer_step", lambda entered: min(entered, default=-1))


def every_preemption_counts_as_saved(patch: pytest.MonkeyPatch) -> None:
    whole = Shutdown.preempt_now

    def preempt_now(self: Shutdown, event: Event, detail: str, **kinds: bool) -> None:
        whole(self, event, detail, stopped=True, stepped=False)

    patch.setattr(Shutdown, "preempt_now", preempt_now)


def what_was_drained_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DrainPlan, "done", lambda self, attempt, present: None)


def drain_is_held_for_the_whole_grace(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(emergency, "_write", lambda slots: True)
    patch.setattr(emergency.EmergencySave, "choose", lambda *_: "")


def fence_is_not_checked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Fence, "check", lambda self: None)


def lease_is_not_waited_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeaseWatch, "judge", lambda self, beat, now: Verdict.TAKE)


def earlier_attempts_stay_where_they_are(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Directory, "sweep", lambda self: None)


BUGS = [
    deadline_is_ignored, crash_during_a_notice_restarts, lost_node_is_charged,
    finished_before_the_memory_is_drained, silent_node_is_waited_for,
    nodes_stop_at_the_earliest_step, every_preemption_counts_as_saved,
    what_was_drained_is_forgotten, drain_is_held_for_the_whole_grace,
    fence_is_not_checked, lease_is_not_waited_out, earlier_attempts_stay_where_they_are,
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_bug_is_caught(bug: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        assert any(simulate(seed) is not None for seed in range(1, UNCAUGHT))


def test_a_run_that_does_not_wait_for_its_bucket_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimMirror, "lacks", "")
    monkeypatch.setattr(SimMirror, "flushed", True)
    assert any("its bucket lacks it" in (simulate(seed) or "") for seed in range(1, 200))
