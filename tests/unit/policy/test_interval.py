"""``--save-interval``: steps, seconds or auto."""

from __future__ import annotations

import pytest

from elastic_ckpt.errors import ExitCode, UsageError
from elastic_ckpt.policy.interval import SaveInterval, parse_interval


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("100", SaveInterval(steps=100)),
        (" 100\n", SaveInterval(steps=100)),
        ("007", SaveInterval(steps=7)),
        ("0", SaveInterval()),
        ("90s", SaveInterval(seconds=90.0)),
        ("0.25s", SaveInterval(seconds=0.25)),
        ("0s", SaveInterval()),
        ("10m", SaveInterval(seconds=600.0)),
        ("1h30m", SaveInterval(seconds=5400.0)),
        ("4.5 min", SaveInterval(seconds=270.0)),
        ("auto", SaveInterval(auto=True)),
        (" auto\n", SaveInterval(auto=True)),
    ],
)
def test_accepted_intervals(text: str, interval: SaveInterval) -> None:
    assert parse_interval(text) == interval


@pytest.mark.parametrize(
    "text",
    ["", " ", "s", "-1", "+1", "1.5", "1.s", ".5s", "1e3", "1e3s", "-3s", "90S", "90ss",
     "5M", "1h30", "nan", "nans", "infs", "0x10", "1_000", "100,5", "100 200", "a\n100",
     "Auto", "autos", "auto 90s"],
)  # fmt: skip
def test_refused_intervals(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"give steps .*, a time with its unit .* or auto"
    ) as raised:
        parse_interval(text)
    assert repr(text) in str(raised.value)
    assert raised.value.exit_code is ExitCode.USAGE


def test_a_save_is_due_at_multiples_of_the_steps() -> None:
    assert [step for step in range(10) if SaveInterval(steps=3).due(step)] == [3, 6, 9]
    assert [step for step in range(4) if SaveInterval(steps=1).due(step)] == [1, 2, 3]


@pytest.mark.parametrize(
    "interval", [SaveInterval(), SaveInterval(seconds=1.0), SaveInterval(auto=True)]
)
def test_without_steps_no_save_is_due_by_step_number(interval: SaveInterval) -> None:
    assert not any(interval.due(step) for step in range(1000))
