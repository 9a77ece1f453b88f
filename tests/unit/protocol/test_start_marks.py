"""No second of a recovery counts twice, and none is left out."""

from __future__ import annotations

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_ckpt.protocol.start_marks import Breakdown, Marks, breakdown, slowest

SECOND = 10**9
moments = st.integers(0, 10**15)
ranks = st.lists(st.builds(Marks, *[moments] * 6), max_size=4)


def seconds(*values: int) -> tuple[int, ...]:
    return tuple(value * SECOND for value in values)


WHOLE = Marks(*seconds(13, 14, 16, 19, 23, 28))


@pytest.mark.parametrize(
    ("before", "marks", "expected"),
    [
        pytest.param((10, 11, 12), [WHOLE], (1, 1, 1, 1, 2, 3, 4, 5), id="every stage"),
        pytest.param(
            (10, 11, 12),
            [WHOLE, Marks(*seconds(13, 14, 15, 20, 22, 29))],
            (1, 1, 1, 1, 2, 4, 3, 6),
            id="the slowest rank counts for each moment",
        ),
        pytest.param(
            (10, 11, 12),
            [Marks(*seconds(13, 0, 0, 19, 23, 28))],
            (1, 1, 1, 0, 0, 6, 4, 5),
            id="without a process group its time goes to what follows",
        ),
        pytest.param(
            (10, 11, 12),
            [Marks(*seconds(13, 16, 14, 19, 23, 28))],
            (1, 1, 1, 3, 0, 3, 4, 5),
            id="a moment before its forerunner counts as the same",
        ),
        pytest.param((10, 9, 8), [WHOLE], (0, 0, 3, 1, 2, 3, 4, 5), id="a failure seen late"),
        pytest.param((10, 11, 12), [], (1, 1, 0, 0, 0, 0, 0, 0), id="no rank came back"),
    ],
)
def test_the_stages_of_a_recovery(
    before: tuple[int, int, int], marks: list[Marks], expected: tuple[int, ...]
) -> None:
    found = breakdown(*seconds(*before), marks)
    assert astuple(found) == expected
    assert found.total == sum(expected)


def test_the_stages_have_the_names_that_the_journal_shows() -> None:
    assert list(Breakdown().stages) == [
        "detect", "stop", "spawn", "import", "rendezvous", "build", "load", "first_step",
    ]  # fmt: skip


@given(moments, moments, moments, ranks)
def test_the_stages_fill_the_time_for_any_moments(
    failed: int, noticed: int, gone: int, marks: list[Marks]
) -> None:
    found = breakdown(failed, noticed, gone, marks)
    assert all(value >= 0 for value in found.stages.values())
    assert found.total == sum(found.stages.values())
    last = max(failed, noticed, gone, *astuple(slowest(marks)))
    assert found.total == pytest.approx((last - failed) / SECOND, abs=1e-6, rel=1e-9)
