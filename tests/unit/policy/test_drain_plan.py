"""What is drained when: a failure waits, a success is remembered."""

from __future__ import annotations

from elastic_ckpt.policy.drain_plan import RETRY_SECONDS, DrainPlan


def test_what_was_drained_is_never_due_again() -> None:
    plan = DrainPlan()
    assert plan.is_due("a", 0.0) and plan.is_due("b", 0.0)
    plan.begin("a")
    plan.done("a", ["a", "b"])
    plan.retry_all()
    assert not plan.is_pending("a") and not plan.is_due("a", 1e9)
    plan.done("b", ["b", "c"])  # a was overwritten, and its name may be forgotten
    assert plan.is_pending("a") and not plan.is_pending("b")


def test_what_failed_waits_unless_it_is_hurried() -> None:
    plan = DrainPlan()
    plan.begin("a")
    plan.failed("a", 100.0)
    due = 100.0 + RETRY_SECONDS
    assert plan.is_pending("a")
    assert not plan.is_due("a", due - 0.1) and not plan.has_retry(due - 0.1)
    assert plan.is_due("a", due) and plan.has_retry(due)
    plan.begin("a")
    assert not plan.has_retry(due)
    plan.failed("a", due, again=True)
    assert plan.is_due("a", due)
    plan.failed("a", due)
    plan.retry_all()
    assert plan.is_due("a", due)
