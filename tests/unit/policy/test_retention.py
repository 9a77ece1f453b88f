"""Which checkpoints a retention keeps."""

from __future__ import annotations

import math
import random

import pytest

from elastic_ckpt.errors import UsageError
from elastic_ckpt.policy.retention import Retention, RetentionCandidate, judge, parse_best


def newest_first(*steps: int, **metrics: list[float]) -> list[RetentionCandidate]:
    """Return candidates named by their step; metric values are in the order of ``steps``."""
    return [
        RetentionCandidate(
            str(step), step, metrics={name: of[index] for name, of in metrics.items()}
        )
        for index, step in enumerate(steps)
    ]


def kept(retention: Retention, candidates: list[RetentionCandidate]) -> list[str]:
    return [verdict.name for verdict in judge(retention, candidates) if verdict.keep]


def test_the_default_keeps_all() -> None:
    assert not Retention()
    assert kept(Retention(), newest_first(30, 20, 10)) == ["30", "20", "10"]


@pytest.mark.parametrize(
    ("count", "names"), [(1, ["30"]), (2, ["30", "20"]), (9, ["30", "20", "10"])]
)
def test_the_last_n_are_kept(count: int, names: list[str]) -> None:
    assert kept(Retention(last=count), newest_first(30, 20, 10)) == names


@pytest.mark.parametrize(
    ("every", "steps", "names"),
    [
        (100, (450, 400, 350, 300, 250, 200, 100), ["450", "400", "300", "200", "100"]),
        (100, (310, 290, 230, 170, 130, 50), ["310", "230", "130"]),  # no save at a multiple
        (1, (3, 2, 1), ["3", "2", "1"]),
        (1000, (30, 20, 10), ["30"]),  # only the newest: the first span has not ended
    ],
)
def test_the_first_in_every_span_of_steps_is_kept(
    every: int, steps: tuple[int, ...], names: list[str]
) -> None:
    assert kept(Retention(every=every), newest_first(*steps)) == names


def test_spans_restart_if_a_script_counts_its_steps_per_epoch() -> None:
    """The first epoch does not use up the spans of the later ones."""
    found = [
        RetentionCandidate(f"{epoch}-{step}", step)
        for epoch in (2, 1, 0)
        for step in (200, 150, 100, 50)
    ]
    names = kept(Retention(every=100), found)
    assert names == [f"{epoch}-{step}" for epoch in (2, 1, 0) for step in (200, 100)]
    once = [RetentionCandidate(f"{epoch}-100", 100) for epoch in (2, 1, 0)]
    assert kept(Retention(every=100), once) == ["2-100", "1-100", "0-100"]


def test_what_every_keeps_is_stable_as_the_job_continues() -> None:
    """A checkpoint kept for its span is still kept by a later decision."""
    steps = sorted(random.Random(7).sample(range(1, 2000), 60))
    there: list[int] = []
    for step in steps:
        there.append(step)
        names = kept(Retention(last=1, every=100), newest_first(*reversed(there)))
        there = sorted(map(int, names))
    first = {min(s for s in steps if s // 100 == span) for span in {s // 100 for s in steps}}
    newest = {steps[-1]}
    assert set(there) - newest == {step for step in first if step >= 100} - newest


@pytest.mark.parametrize(("highest", "names"), [(False, ["40", "20"]), (True, ["40", "30"])])
def test_the_best_is_the_lowest_unless_highest_is_set(highest: bool, names: list[str]) -> None:
    found = newest_first(40, 30, 20, 10, score=[2.0, 9.0, 1.0, 5.0])
    assert kept(Retention(best=1, metric="score", highest=highest), found) == names


@pytest.mark.parametrize("highest", [False, True])
def test_the_newest_wins_among_equal_metrics(highest: bool) -> None:
    found = newest_first(50, 40, 30, 20, score=[math.nan, 1.0, 1.0, 1.0])
    rule = Retention(best=2, metric="score", highest=highest)
    assert kept(rule, found) == ["50", "40", "30"]


@pytest.mark.parametrize("highest", [False, True])
def test_nan_and_missing_metrics_are_never_the_best(highest: bool) -> None:
    found = [
        RetentionCandidate("5", 5),
        RetentionCandidate("4", 4, metrics={"score": math.nan}),
        RetentionCandidate("3", 3, metrics={"other": 0.0}),
        RetentionCandidate("2", 2, metrics={"score": 7.0}),
        RetentionCandidate("1", 1),
    ]
    assert kept(Retention(best=3, metric="score", highest=highest), found) == ["5", "2"]


@pytest.mark.parametrize(("highest", "best"), [(False, "2"), (True, "1")])
def test_infinities_are_ordered_as_numbers(highest: bool, best: str) -> None:
    found = newest_first(3, 2, 1, score=[0.0, -math.inf, math.inf])
    assert kept(Retention(best=1, metric="score", highest=highest), found) == ["3", best]


def test_a_checkpoint_is_kept_if_any_field_selects_it() -> None:
    found = newest_first(600, 550, 500, 450, 400, 350, 300, loss=[6, 5, 4, 3, 0, 1, 2])
    rule = Retention(last=2, every=500, best=1, metric="loss")
    verdicts = {verdict.name: (verdict.keep, verdict.why) for verdict in judge(rule, found)}
    assert verdicts == {
        "600": (True, "the newest"),
        "550": (True, "one of the last 2"),
        "500": (True, "the first of 500 steps"),
        "450": (False, "no rule keeps it"),
        "400": (True, "one of the best 1 by loss"),
        "350": (False, "no rule keeps it"),
        "300": (False, "no rule keeps it"),
    }


@pytest.mark.parametrize(
    "rule",
    [Retention(last=1), Retention(every=10), Retention(best=1, metric="loss")],
    ids=["last", "every", "best"],
)
def test_the_newest_usable_checkpoint_is_always_kept(rule: Retention) -> None:
    """Even if it is neither a multiple nor the best."""
    assert kept(rule, newest_first(7, 5, loss=[2.0, 1.0]))[0] == "7"


def test_an_unusable_checkpoint_is_kept_and_does_not_count() -> None:
    """It counts neither as the newest nor as one of the last."""
    found = [
        RetentionCandidate("40", 40, usable=False, metrics={"loss": 0.0}),
        RetentionCandidate("30", 30, metrics={"loss": 3.0}),
        RetentionCandidate("20", 20, usable=False),
        RetentionCandidate("10", 10, metrics={"loss": 1.0}),
        RetentionCandidate("5", 5, metrics={"loss": 2.0}),
    ]
    assert kept(Retention(last=1), found) == ["40", "30", "20"]
    assert kept(Retention(best=1, metric="loss"), found) == ["40", "30", "20", "10"]
    assert judge(Retention(last=1), found)[0].why == "not intact: left alone"


def test_verdicts_come_in_the_order_of_the_candidates() -> None:
    found = newest_first(9, 8, 7, 6)
    assert [verdict.name for verdict in judge(Retention(last=2), found)] == ["9", "8", "7", "6"]
    assert judge(Retention(last=2), []) == []


@pytest.mark.parametrize(
    "arguments",
    [{"last": -1}, {"every": -5}, {"best": -1, "metric": "m"}, {"best": 2}, {"metric": "loss"}],
    ids=str,
)
def test_contradictory_fields_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Retention(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("2:loss", (2, "loss", False)),
        ("2:loss:min", (2, "loss", False)),
        ("10:accuracy:max", (10, "accuracy", True)),
        ("1:eval/loss", (1, "eval/loss", False)),
        ("1:max", (1, "max", False)),
    ],
)
def test_parse_best(text: str, parsed: tuple[int, str, bool]) -> None:
    assert parse_best(text) == parsed


@pytest.mark.parametrize(
    "text",
    ["", "loss", "0:loss", "-1:loss", "1.5:loss", "2:", "2::max", "2:loss:best", "2:loss:max:x",
     "²:loss", "9" * 5000 + ":loss", ":loss"],
    ids=lambda text: text[:12] or "empty",
)  # fmt: skip
def test_parse_best_refuses_other_forms(text: str) -> None:
    with pytest.raises(UsageError, match="N:METRIC"):
        parse_best(text)


def test_automatic_rule_deletes_only_automatic_checkpoints() -> None:
    """What the user asked for, and the last two, stay."""
    steps = range(9, 0, -1)
    found = [RetentionCandidate(f"step-{one}", one, automatic=one % 3 != 0) for one in steps]
    kept = [one.name for one in judge(Retention(automatic=2), found) if one.keep]
    assert kept == ["step-9", "step-8", "step-6", "step-3"]
