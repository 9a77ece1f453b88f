"""Digests of a job and of its replay: which are compared, and where they first differ."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from elastic_ckpt.cli.replay.comparison import bounds_of, first_difference, read_chain, spacing
from elastic_ckpt.journal.audit_events import Audited, StateDigest
from elastic_ckpt.journal.events import CheckpointLoaded, RunStarted
from elastic_ckpt.journal.history import History
from elastic_ckpt.journal.line import JournalEntry

NAMES = {0: ["layer.weight", "layer.bias"], 1: ["layer.weight", "layer.bias"]}


def digest(step: int, **changes: Any) -> StateDigest:
    made = StateDigest(
        step=step, sample_start_index=4 * step, order="o", parameters="p", optimizer="q",
        tensors=tensors(b"aaaa", b"bbbb"), norm=2.0, loss=0.5, device="cpu",
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def tensors(*digests: bytes) -> str:
    return base64.b64encode(b"".join(digests)).decode()


def entries(*found: tuple[int, StateDigest]) -> list[JournalEntry]:
    return [
        JournalEntry(event=event, wall=float(at), monotonic=0.0, node="n", rank=rank)
        for at, (rank, event) in enumerate(found)
    ]


def test_a_chain_ends_where_the_number_of_ranks_changes() -> None:
    found = [(rank, digest(step)) for step in (10, 20, 30) for rank in range(2)]
    found += [(0, digest(40)), *((rank, digest(50)) for rank in range(2))]
    chain = read_chain(entries(*found), 10, 2)
    assert sorted(chain) == [(20, 0), (20, 1), (30, 0), (30, 1)]
    assert spacing(chain) == 10


def test_of_a_step_that_was_trained_twice_the_last_counts() -> None:
    chain = read_chain(entries((0, digest(10, loss=1.0)), (0, digest(10))), 0, 1)
    assert chain[10, 0].loss == 0.5


def test_what_the_job_has_gone_back_behind_is_not_compared() -> None:
    """Steps 30 and 40 were trained before the job continued from step 20, another way perhaps."""
    events = [digest(step) for step in (10, 20, 30, 40)]
    first = [replace(one, incarnation=1) for one in entries(*((0, one) for one in events))]
    later = [CheckpointLoaded(step=20), digest(30, loss=1.0)]
    second = [replace(one, incarnation=2) for one in entries(*((0, one) for one in later))]
    for order in ([*first, *second], [*second, *first]):  # clocks of nodes may differ
        chain = read_chain(order, 0, 1)
        assert [step for step, _ in sorted(chain)] == [10, 20, 30]
        assert chain[30, 0].loss == 1.0


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"parameters": "x", "tensors": tensors(b"aaaa", b"xxxx")}, "layer.bias"),
        (
            {"optimizer": "x", "tensors": tensors(b"xxxx", b"xxxx")},
            "layer.weight and 1 more tensors",
        ),
        ({"parameters": "x", "tensors": ""}, "parameters"),
        ({"optimizer": "x", "tensors": tensors(b"aaaa")}, "the optimizer's state"),
        ({"parameters": "x"}, "parameters"),  # beyond what the short digests show
        ({"loss": 0.25}, "the loss: 0.5, and now 0.25"),
        ({"order": "x"}, "the data, or the order of its samples"),
        ({"sample_start_index": 7}, "the samples: epoch 0, sample 80, and now 0, 7"),
    ],
)
def test_the_first_difference_is_named(changes: dict[str, Any], what: str) -> None:
    before = {(step, rank): digest(step) for step in (10, 20, 30) for rank in range(2)}
    now = before | {(20, 1): digest(20, **changes), (30, 0): digest(30, parameters="y")}
    found = first_difference(before, now, NAMES)
    assert found is not None and (found.step, found.rank, found.what) == (20, 1, what)
    assert first_difference(before, before, NAMES) is None


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"parameters": "x", "norm": 2.0001, "loss": 0.501}, None),
        ({"norm": 2.1}, "the parameters' norm: 2, and now 2.1"),
        ({"loss": 0.6}, "the loss: 0.5, and now 0.6"),
        ({"loss": None}, None),
        ({"order": "x"}, "the data, or the order of its samples"),
    ],
)
def test_on_other_hardware_values_are_compared(changes: dict[str, Any], what: str | None) -> None:
    before, now = {(10, 0): digest(10)}, {(10, 0): digest(10, device="another", **changes)}
    assert bounds_of(before, now) == "computed by another and by cpu"
    found = first_difference(before, now, NAMES)
    assert (found.what if found else None) == what


@pytest.mark.parametrize(("first", "shown"), [(100, True), (0, True), (50, False)])
def test_a_difference_stays_until_a_replay_of_that_step_is_equal(first: int, shown: bool) -> None:
    history = History()
    events = [
        RunStarted(),
        Audited(first=40, last=90, ranks=2, different="step 80, rank 1: x", at=80),
        Audited(first=first, last=first + 60, ranks=2),
    ]
    for at, event in enumerate(events, 1):
        history.observe(JournalEntry(event=event, wall=float(at), monotonic=0.0, node="n"))
    assert history.audit is not None
    assert bool(history.audit[1].different) is shown
    assert history.last == 1.0  # the job's own end
