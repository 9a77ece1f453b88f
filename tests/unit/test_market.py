"""The arithmetic of docs/market.md: its traces, and what a market costs."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from market.page import BEGIN, END, picture, tables
from market.traces import GENERATORS, Change, lanes, recorded, several
from market.virtual import Costs, goodput

PAGE = Path(__file__).parents[2] / "docs" / "market.md"
FREE = Costs(0, 0, 0, 0.0, keeps_on_notice=True, keeps_on_coming=True, in_memory=False)


def counts(changes: list[Change]) -> list[int]:
    now, found = 0, []
    for change in changes:
        now += 1 if change.comes else -1
        found.append(now)
    return found


def test_recorded_trace_is_whole():
    changes = recorded()
    assert len(changes) == 344 and changes == sorted(changes, key=lambda change: change.at)
    assert max(counts(changes)) == 32 and counts(changes)[-1] == 10
    assert len({change.node for change in changes if change.comes}) == 177


@pytest.mark.parametrize("name", GENERATORS)
def test_generated_markets_are_consistent_and_repeatable(name):
    changes = GENERATORS[name](24, 86_400.0, 7)
    assert changes == GENERATORS[name](24, 86_400.0, 7) != GENERATORS[name](24, 86_400.0, 8)
    assert min(counts(changes)) >= 0 and max(counts(changes)) == 24
    alive = set()
    for change in changes:
        assert (change.node in alive) is not change.comes
        alive ^= {change.node}


def test_lanes_keep_lives_of_the_trace():
    """A place's first life is that of a node which was there at the start."""
    changes = lanes(recorded(), 4)
    assert {change.node for change in changes} == {1, 2, 3, 4}
    assert min(counts(changes)) >= 0 and max(counts(changes)) == 4
    ends = {change.at for change in recorded() if not change.comes}
    assert {change.at for change in changes if not change.comes} <= ends


def test_several_markets_have_as_many_changes():
    changes = several(recorded(), 3, apart=0.0)
    assert counts(changes)[-1] == 3 * 10
    assert len({(change.node, change.comes) for change in changes}) == 3 * 344


def test_goodput_of_a_job_that_nothing_costs_is_everything():
    assert goodput(recorded(), FREE) == pytest.approx(1.0)


def test_goodput_by_hand():
    """Two nodes for 1,000 s; one is lost at 400 s, 3 s after a save; 10 s until the next step."""
    changes = [
        Change(0, 1, True), Change(0, 2, True), Change(403, 2, False), Change(1003, 1, False, 30),
    ]  # fmt: skip
    cost = Costs(10, 0, 0, 0.0, keeps_on_notice=True, keeps_on_coming=True, in_memory=False)
    available = 2 * 403 + 600
    # The best interval of a save that costs nothing is the shortest one: 5 s.
    assert goodput(changes, cost) == pytest.approx((2 * 400 + 590) / available)


def test_losing_several_costs_more_where_saves_are_in_memory():
    changes = [
        *(Change(0, node, True) for node in (1, 2, 3)),
        Change(100, 1, False), Change(100, 2, False), Change(200, 3, False, 30),
    ]  # fmt: skip
    of = [
        goodput(
            changes,
            Costs(0, 0, 0, 0.0, keeps_on_notice=True, keeps_on_coming=True, in_memory=in_memory),
        )
        for in_memory in (False, True)
    ]
    assert of[1] == pytest.approx(of[0] - 3 * 5 / 400)


def test_page_and_picture():
    """A contender that did not run, one that has no result, and one that has."""
    one = {
        "available": 100.0, "made": 90, "seconds": 30.0, "ended": 0, "note": "", "lost_steps": 5,
        "verdict": {"steps": 85, "taken": 700, "repeated": 0, "skipped": 0, "torn": False},
        "gaps": {"lost": [2.0, 3.0], "start": [4.0]}, "presence": [(0, 4)],
        "progress": [(5, 10), (20, 400), (30, 700)], "goodput": 0.7, "in_memory": True,
        "keeps_on_notice": True, "keeps_on_coming": True,
    }  # fmt: skip
    found = {
        "machine": {"cores": 2, "versions": {"torch": "2"}},
        "settings": {
            "hosts": 4, "seed": 1, "megabytes": 10.0, "every": 5.0, "step_seconds": 0.1,
            "markets": {"p3": [1.0, 100.0]},
        },
        "samples_per_second": 10.0,
        "markets": {
            "p3": {
                "elastic-ckpt": one,
                "torchrun": one | {"verdict": {}, "note": "no result", "goodput": 0.0},
                "NVRx ft_launcher": {"note": "not run: it is not installed"},
            }
        },
    }  # fmt: skip
    text = "\n".join(tables(json.loads(json.dumps(found))))
    assert "| elastic-ckpt | 0.700 | 5 of 90 | 0, 0 | right | 2.5 s; 3.0 s, -, - |" in text
    assert "| torchrun | 0.000: no result |" in text and "not run" in text
    assert picture(found).count("<path") >= 5
    assert BEGIN in PAGE.read_text() and END in PAGE.read_text()
