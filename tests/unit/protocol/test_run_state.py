"""Every (state, event) pair, against a table written out by hand; and what follows from it."""

from __future__ import annotations

from itertools import product

import pytest

from elastic_ckpt.protocol.run_state import TERMINAL, TRANSITIONS, Event, RunState, advance

EXPECTED = """
            starting     running      draining   backing-off  finished  preempted  failed
stepping    running      .            .          .            .         .          .
notice      draining     draining     .          draining     .         .          .
completed   finished     finished     finished   .            .         .          .
stopped     .            .            preempted  .            .         .          .
crash       backing-off  backing-off  preempted  .            .         .          .
regroup     .            starting     .          .            .         .          .
abandoned   preempted    preempted    preempted  preempted    .         .          .
retry       .            .            .          starting     .         .          .
give-up     failed       failed       failed     failed       .         .          .
expired     .            .            preempted  .            .         .          .
"""


def expected() -> dict[tuple[RunState, Event], RunState]:
    header, *rows = EXPECTED.strip().splitlines()
    states = [RunState(name) for name in header.split()]
    table = {}
    for row in rows:
        name, *cells = row.split()
        for state, cell in zip(states, cells, strict=True):
            table[state, Event(name)] = state if cell == "." else RunState(cell)
    return table


def reachable(start: RunState) -> set[RunState]:
    """Every state that any sequence of events leads to."""
    found, pending = {start}, [start]
    while pending:
        state = pending.pop()
        for event in Event:
            after = advance(state, event)
            if after not in found:
                found.add(after)
                pending.append(after)
    return found


@pytest.mark.parametrize(("state", "event"), list(product(RunState, Event)))
def test_every_pair(state: RunState, event: Event) -> None:
    assert advance(state, event) is expected()[state, event]


def test_the_table_lists_no_pair_that_changes_nothing() -> None:
    assert all(after is not before for (before, _), after in TRANSITIONS.items())


@pytest.mark.parametrize("state", sorted(TERMINAL, key=lambda state: state.value))
def test_a_terminal_state_absorbs(state: RunState) -> None:
    assert reachable(state) == {state}


def test_nothing_is_launched_after_a_notice() -> None:
    """Not even a crash after the notice launches again."""
    assert reachable(RunState.DRAINING) == {RunState.DRAINING, *TERMINAL}


@pytest.mark.parametrize("state", [state for state in RunState if state not in TERMINAL])
def test_a_notice_always_leads_away_from_training(state: RunState) -> None:
    assert advance(state, Event.NOTICE) in (RunState.DRAINING, RunState.PREEMPTED)


def test_every_state_can_be_reached_and_left() -> None:
    assert reachable(RunState.STARTING) == set(RunState)
    assert all(reachable(state) & TERMINAL for state in RunState)
