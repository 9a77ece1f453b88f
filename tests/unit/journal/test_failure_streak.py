"""What is left of the failure budget when another node takes the head's place."""

from __future__ import annotations

import pytest

from elastic_ckpt.journal.failure_streak import failures_in_a_row
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.policy.failure import Failure
from elastic_ckpt.policy.restart import RestartAction, RestartPolicy
from tests.journals import happened


def journal(*words: str) -> list[JournalEntry]:
    """Return entries of the nodes' journals: ``node:event`` or ``node:event:kind``."""
    found: list[JournalEntry] = []
    for second, word in enumerate(words):
        node, name, *kind = word.split(":")
        data: dict[str, object] = {"crash": {"kind": "".join(kind)}, "saved": {"step": second}}.get(
            name, {}
        )
        found.append(happened(float(second), name, data, node=node))
    return found


START = "n1:start"


@pytest.mark.parametrize(
    ("words", "count"),
    [
        pytest.param([START], 0, id="no failure"),
        pytest.param([START, "n1:crash:error", "n1:crash:signal"], 2, id="two"),
        pytest.param([START, "n1:crash:error", "n1:crash:membership"], 1, id="a node vanished"),
        pytest.param([START, "n1:crash:error", "n1:saved"], 0, id="a save after it"),
        pytest.param([START, "n1:saved", "n1:crash:error"], 1, id="a save before it"),
        pytest.param([START, "n1:crash:error", START], 0, id="a user began anew"),
        pytest.param(
            [START, "n1:crash:error", "n2:start", "n2:head_taken_over", "n2:crash:error"], 2,
            id="another node has led meanwhile",
        ),
        pytest.param(
            [START, "n1:crash:error", "n3:start", "n3:head_taken_over"], 1,
            id="this node's own start",
        ),
    ],
)  # fmt: skip
def test_failures_in_a_row(words: list[str], count: int) -> None:
    assert failures_in_a_row(journal(*words), "n3", 0) == count


def test_the_next_head_ends_the_job_where_the_lost_one_would_have() -> None:
    failure = Failure(0, 1, "", stepped=True, lived=100.0, steps=3, newest=(0, 6))
    before, after = RestartPolicy(3), RestartPolicy(3)
    assert [before.decide(failure).action for _ in range(2)] == [RestartAction.RESTART] * 2
    after.carry_on(before.failures, (0, 6))
    assert after.left == 1
    actions = [after.decide(failure).action for _ in range(2)]
    assert actions == [RestartAction.RESTART, RestartAction.STOP]
