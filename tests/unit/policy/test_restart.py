"""What each class of failures leads to, and the back-off."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from elastic_ckpt.policy.failure import NOTHING_SAVED, Failure, FailureClass
from elastic_ckpt.policy.restart import (
    BLAME_SECONDS,
    FIRST_BACKOFF_SECONDS,
    MAX_BACKOFF_SECONDS,
    REFILL_STEPS,
    RULES,
    RestartAction,
    RestartPolicy,
)

RESTART, FALL_BACK, STOP = RestartAction.RESTART, RestartAction.FALL_BACK, RestartAction.STOP

EXAMPLES = {
    FailureClass.LAUNCH: (70, "the workers could not be launched: OSError: no"),
    FailureClass.START_UP: (1, "ImportError: no"),
    FailureClass.ERROR: (1, "ValueError: no"),
    FailureClass.NON_FINITE: (70, "NonFiniteLoss: nan"),
    FailureClass.DEVICE_MEMORY: (1, "OutOfMemoryError: CUDA out of memory"),
    FailureClass.HOST_MEMORY: (-9, ""),
    FailureClass.FAULT: (-11, ""),
    FailureClass.SIGNAL: (-9, ""),
    FailureClass.HANG: (0, "no progress for 300 s"),
    FailureClass.STORAGE: (70, "StorageFailed: full"),
    FailureClass.MEMBERSHIP: (0, "lost node n2"),
}


def failure(
    kind: FailureClass = FailureClass.SIGNAL,
    *,
    steps: int = 10,
    step: int = 0,
    stepped: bool = True,
    newest: tuple[int, ...] = NOTHING_SAVED,
) -> Failure:
    exit_code, message = EXAMPLES[kind]
    if kind in (FailureClass.START_UP, FailureClass.LAUNCH):
        stepped = False
    out_of_memory = kind is FailureClass.HOST_MEMORY
    hung = kind is FailureClass.HANG
    lost = ("n2",) if kind is FailureClass.MEMBERSHIP else ()
    rank = -1 if kind is FailureClass.LAUNCH else 1
    made = Failure(
        rank, exit_code, message, stepped, steps, step, out_of_memory, hung, lost, newest=newest
    )
    assert made.kind is kind
    return made


def decisions(policy: RestartPolicy, *failures: Failure) -> list[RestartAction]:
    return [policy.decide(one).action for one in failures]


def test_every_class_has_a_rule_and_an_example() -> None:
    assert set(RULES) == set(EXAMPLES) == set(FailureClass)


@pytest.mark.parametrize(
    ("kind", "before_a_step", "same_step_thrice"),
    [
        (FailureClass.START_UP, STOP, [STOP, STOP, STOP]),
        (FailureClass.LAUNCH, STOP, [STOP, STOP, STOP]),
        (FailureClass.ERROR, RESTART, [RESTART, FALL_BACK, STOP]),
        (FailureClass.NON_FINITE, RESTART, [RESTART, FALL_BACK, STOP]),
        (FailureClass.DEVICE_MEMORY, STOP, [RESTART, FALL_BACK, STOP]),
        (FailureClass.HOST_MEMORY, RESTART, [RESTART, RESTART, RESTART]),
        (FailureClass.FAULT, RESTART, [RESTART, FALL_BACK, STOP]),
        (FailureClass.SIGNAL, RESTART, [RESTART, RESTART, RESTART]),
        (FailureClass.HANG, RESTART, [RESTART, FALL_BACK, STOP]),
        (FailureClass.STORAGE, RESTART, [RESTART, RESTART, RESTART]),
        (FailureClass.MEMBERSHIP, RESTART, [RESTART, RESTART, RESTART]),
    ],
)
def test_the_decision_for_each_class(
    kind: FailureClass, before_a_step: RestartAction, same_step_thrice: list[RestartAction]
) -> None:
    if kind is not FailureClass.ERROR:  # one before a step is an error at start-up
        assert RestartPolicy(5).decide(failure(kind, stepped=False)).action is before_a_step
    again = [failure(kind, step=7)] * 3
    assert decisions(RestartPolicy(5), *again) == same_step_thrice


def test_only_consecutive_failures_of_a_step_count_against_it() -> None:
    error = [failure(FailureClass.ERROR, step=step) for step in (7, 8, 7, 8)]
    assert decisions(RestartPolicy(9), *error) == [RESTART] * 4
    killed = failure(FailureClass.SIGNAL, step=7)  # from outside: not the step's fault
    mixed = [error[0], killed, error[0], killed, error[0]]
    expected = [RESTART, RESTART, FALL_BACK, RESTART, STOP]
    assert decisions(RestartPolicy(9), *mixed) == expected


def test_unknown_steps_are_never_the_same() -> None:
    error = failure(FailureClass.ERROR, step=0)
    assert decisions(RestartPolicy(9), *[error] * 4) == [RESTART] * 4


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (failure(FailureClass.START_UP), "no retry"),
        (failure(FailureClass.DEVICE_MEMORY, stepped=False), "no retry; use smaller micro-batches"),
        (failure(FailureClass.SIGNAL), "1 failure"),
        (
            failure(FailureClass.HOST_MEMORY),
            "1 failure; give the job more memory, or fewer DataLoader workers",
        ),
    ],
)
def test_a_stop_gives_a_reason_and_advice(given: Failure, why: str) -> None:
    assert RestartPolicy(0).decide(given).why == why


def test_the_reason_names_the_step() -> None:
    policy = RestartPolicy(9)
    found = [policy.decide(failure(FailureClass.NON_FINITE, step=7)).why for _ in range(3)]
    assert found[0] == ""
    assert found[1] == "step 7 failed twice"
    assert found[2].startswith("step 7 failed 3 times; look at the data of that step")


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_a_budget_of_n_retries_n_consecutive_failures(allowed: int) -> None:
    policy = RestartPolicy(allowed)
    actions = []
    left = []
    for _ in range(allowed + 2):
        actions.append(policy.decide(failure()).action)
        left.append(policy.left)
    assert actions == [RESTART] * allowed + [STOP, STOP]
    assert left == [*range(allowed - 1, -1, -1), 0, 0]
    assert policy.total == allowed + 2


def test_lost_nodes_are_not_charged_to_the_budget() -> None:
    policy = RestartPolicy(1)
    lost = [failure(FailureClass.MEMBERSHIP, steps=0)] * 20
    assert decisions(policy, *lost) == [RESTART] * 20
    assert (policy.left, policy.total) == (1, 0)
    # But a node that comes and goes is slowed down.
    assert policy.backoff_seconds(random.Random(1)) > 0


def test_steady_progress_refills_the_budget() -> None:
    policy = RestartPolicy(2)
    assert decisions(policy, failure(), failure(steps=REFILL_STEPS - 1)) == [RESTART] * 2
    assert policy.left == 0
    assert decisions(policy, failure(steps=REFILL_STEPS)) == [RESTART]
    assert (policy.failures, policy.left, policy.total) == (1, 1, 3)


def test_a_newer_checkpoint_refills_the_budget() -> None:
    """Each kill comes after 900 steps of a minute, in which checkpoints were sealed."""
    policy = RestartPolicy(3)
    killed = [failure(steps=900, step=k + 1, newest=(0, k)) for k in range(900, 9001, 900)]
    assert decisions(policy, *killed) == [RESTART] * 10
    assert (policy.left, policy.total) == (2, 10)


@pytest.mark.parametrize(
    ("newest", "steps", "left"),
    [
        pytest.param((0, 450), 5, 1, id="no progress"),
        pytest.param((0, 500), 5, 3, id="a newer checkpoint"),
        pytest.param((0, 450), REFILL_STEPS, 3, id="many steps"),
    ],
)
def test_progress_shows_at_once_that_the_budget_is_full_again(
    newest: tuple[int, ...], steps: int, left: int
) -> None:
    policy = RestartPolicy(3)
    decisions(policy, *[failure(newest=(0, 450))] * 2)
    policy.progressed(newest, steps)
    assert policy.left == left


def test_a_checkpoint_that_is_sealed_after_a_failure_counts_for_that_one_alone() -> None:
    """It was complete before the worker was killed; two failures in a row resumed from it."""
    policy = RestartPolicy(1)
    assert decisions(policy, failure(newest=(0, 400))) == [RESTART]
    policy.resumes_from((0, 450))
    assert decisions(policy, failure(newest=(0, 450))) == [STOP]

    policy = RestartPolicy(2)
    decisions(policy, *[failure(newest=(0, 400))] * 2)
    policy.resumes_from((0, 450))
    assert policy.left == 1


def test_a_budget_is_spent_where_no_failure_leaves_a_newer_checkpoint() -> None:
    """One that was saved again after a fall-back is not newer."""
    policy = RestartPolicy(3)
    stuck = [failure(newest=(0, step)) for step in (90, 90, 80, 90)]
    assert decisions(policy, *stuck) == [RESTART] * 3 + [STOP]


def test_a_step_is_blamed_only_if_the_job_resumed_from_the_same_checkpoint() -> None:
    """A count that starts again with each epoch gives the same number to other steps."""
    fault = [failure(FailureClass.FAULT, step=8, newest=(epoch, 6)) for epoch in range(5)]
    assert decisions(RestartPolicy(3), *fault) == [RESTART] * 5
    again = [failure(FailureClass.FAULT, step=8, newest=key) for key in ((0, 6), (0, 6), (0, 3))]
    assert decisions(RestartPolicy(3), *again) == [RESTART, FALL_BACK, STOP]


class _Longest(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return b


class _Shortest(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return a


@pytest.mark.parametrize(
    ("stuck", "longest"),
    [
        (0, 0.0),
        (1, 0.0),
        (2, FIRST_BACKOFF_SECONDS),
        (3, 2 * FIRST_BACKOFF_SECONDS),
        (5, 8 * FIRST_BACKOFF_SECONDS),
        (8, 64 * FIRST_BACKOFF_SECONDS),
        (9, MAX_BACKOFF_SECONDS),
        (10_000, MAX_BACKOFF_SECONDS),
    ],
)
def test_the_back_off_doubles_up_to_a_limit_with_jitter(stuck: int, longest: float) -> None:
    """Consecutive failures without a finished step count."""
    policy = RestartPolicy(20_000)
    for _ in range(stuck):
        policy.decide(failure(steps=0))
    assert policy.backoff_seconds(_Longest()) == longest
    assert policy.backoff_seconds(_Shortest()) == longest / 2
    seconds = [policy.backoff_seconds(random.Random(seed)) for seed in range(50)]
    assert all(longest / 2 <= each <= longest for each in seconds)
    assert len(set(seconds)) > 40 or not longest


def test_a_finished_step_ends_the_back_off_but_not_the_count() -> None:
    policy = RestartPolicy(5)
    for _ in range(3):
        policy.decide(failure(steps=0))
    assert policy.backoff_seconds(_Longest()) > 0
    policy.decide(failure(steps=1))
    assert policy.backoff_seconds(_Longest()) == 0.0
    assert policy.left == 1
    policy.decide(failure(steps=0))
    policy.decide(failure(steps=0))
    assert policy.backoff_seconds(_Longest()) == FIRST_BACKOFF_SECONDS


def start(message: str, lived: float = 0.0) -> Failure:
    return Failure(0, 1, message, stepped=False, lived=lived)


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([start("ImportError: no")], [STOP]),
        ([start("ReadTimeout: hub", 5.0)] * 2, [RESTART, STOP]),
        ([start("ProcessRaisedException: UsageError: no", 5.0)], [STOP]),
        ([start("Refused: port 1", 5.0), start("Refused: port 2", 5.0)], [RESTART, STOP]),
        ([start("ReadTimeout: hub", 5.0), start("KeyError: x", 5.0)], [RESTART, RESTART]),
        ([start("ReadTimeout: hub", 5.0), start("KeyError: x", 1.0)], [RESTART, STOP]),
        # It has worked before: its checkpoint is worth another start.
        ([failure(), start("ReadTimeout: hub"), failure()], [RESTART] * 3),
        ([failure(), *[start("ReadTimeout: hub")] * 2], [RESTART, RESTART, STOP]),
        # A script without a Session shows no steps: that it lived is what is known.
        ([start("ReadTimeout: hub", 61.0)] * 3, [RESTART] * 3),
    ],
)
def test_start_that_may_pass_is_retried_until_it_fails_twice_alike(
    failures: list[Failure], expected: list[RestartAction]
) -> None:
    assert decisions(RestartPolicy(9), *failures) == expected


LEAVE_OUT = RestartAction.LEAVE_OUT


def of_node(node: str, given: Failure, *, at: float = 0.0, spare: bool = True) -> Failure:
    return replace(given, node=node, at=at, dispensable=spare)


KILLED, RAISED = failure(), failure(FailureClass.ERROR, step=7)
NO_START = failure(FailureClass.START_UP)


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        # Three in a row, whatever the others did before.
        ([of_node("n2", KILLED)] * 3, [RESTART, RESTART, LEAVE_OUT]),
        ([of_node(n, KILLED) for n in ("n1", "n2", "n2", "n2")], [RESTART] * 3 + [LEAVE_OUT]),
        ([of_node(n, KILLED) for n in ("n2", "n2", "n1", "n2", "n2")], [RESTART] * 5),
        # Not of a node that is alone, nor long ago, nor what a node cannot be blamed for.
        ([KILLED] * 4, [RESTART] * 4),
        ([of_node("n2", KILLED, at=n * BLAME_SECONDS / 2 + n) for n in range(4)], [RESTART] * 4),
        ([of_node("n2", failure(FailureClass.STORAGE))] * 4, [RESTART] * 4),
        # Lost nodes in between change nothing.
        (
            [of_node("n2", KILLED), failure(FailureClass.MEMBERSHIP), *[of_node("n2", KILLED)] * 2],
            [RESTART, RESTART, RESTART, LEAVE_OUT],
        ),
        # Two in a row before the job falls back or stops, if it has nodes to spare.
        ([of_node("n2", RAISED)] * 2, [RESTART, LEAVE_OUT]),
        ([of_node("n2", RAISED, spare=False)] * 3, [RESTART, FALL_BACK, STOP]),
        ([of_node(n, RAISED) for n in ("n1", "n2", "n1")], [RESTART, FALL_BACK, STOP]),
        # It was not the node: another one fails in the same way, and then the state is to blame.
        ([of_node(n, RAISED) for n in ("n2", "n2", "n1")], [RESTART, LEAVE_OUT, FALL_BACK]),
        # One that is needed is marked all the same.
        ([of_node("n2", KILLED, spare=False)] * 3, [RESTART, RESTART, LEAVE_OUT]),
    ],
)
def test_node_whose_workers_fail_again_and_again_is_left_out(
    failures: list[Failure], expected: list[RestartAction]
) -> None:
    assert decisions(RestartPolicy(9), *failures) == expected


def test_node_that_cannot_start_workers_is_left_out_before_the_job_stops() -> None:
    policy = RestartPolicy(3)
    slow = replace(NO_START, lived=10.0)
    assert decisions(policy, of_node("n2", slow), of_node("n2", slow)) == [RESTART, LEAVE_OUT]
    assert decisions(policy, of_node("n1", slow)) == [STOP]  # it is the script


def test_budget_that_is_spent_leaves_a_node_out_once() -> None:
    policy = RestartPolicy(1)
    assert decisions(policy, *[of_node("n2", KILLED)] * 2) == [RESTART, LEAVE_OUT]
    assert decisions(policy, of_node("n1", KILLED)) == [STOP]


@pytest.mark.parametrize(
    ("then", "cleared"),
    [
        (of_node("n1", RAISED), "n2"),
        (of_node("n2", RAISED), ""),  # it took part all the same
        (of_node("n1", KILLED), ""),
        (of_node("n1", failure(FailureClass.ERROR, step=8)), ""),
        (of_node("n1", replace(RAISED, newest=(0, 6))), ""),  # the job has moved on
    ],
)
def test_node_is_cleared_if_another_one_fails_in_the_same_way(then: Failure, cleared: str) -> None:
    policy = RestartPolicy(9)
    assert decisions(policy, *[of_node("n2", RAISED)] * 2) == [RESTART, LEAVE_OUT]
    assert policy.decide(then).let_in == cleared
    assert policy.decide(then).let_in == ""
