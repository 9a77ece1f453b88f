"""What to save before a node goes: a table, and an oracle that knows the true costs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elastic_ckpt.policy.emergency import ChoiceKind, EmergencyChoice, Outlook, choose
from elastic_ckpt.policy.prediction import MAX_MARGIN, MIN_MARGIN, Predictor, Route, RouteModel

FULL, DRAIN, NOTHING = ChoiceKind.FULL, ChoiceKind.DRAIN_NEWEST, ChoiceKind.NOTHING
PEER = ChoiceKind.PEER

GB = 10**9


def knowing(**seconds_per_gb: float) -> Predictor:
    """A predictor with a margin of 1.5 on each route; fixed costs are negligible."""
    return Predictor(
        {Route(name): RouteModel(rate / GB, 1e-3, 1.5) for name, rate in seconds_per_gb.items()}
    )


KNOWN = knowing(disk=10.0, drain=8.0)  # 15 s and 12 s with the margin
SLOW_DRAIN = knowing(disk=10.0, drain=16.0)  # 15 s and 24 s
DRAINED = knowing(memory=1.0, drain=10.0)  # no save ever went straight to the disk


SLOW_DISK = knowing(disk=10.0, drain=8.0, memory=1.0, peer=2.0)
"""On two nodes: 1 s for the step, 1.5 s into memory, 1.5 s for a copy of half a GB."""

FAST_DISK = knowing(disk=1.5, drain=1.5, memory=1.0, peer=2.0)
NO_DISK = knowing(memory=1.0, peer=2.0)  # the first drain is still under way


def outlook(left: float, **changes: object) -> Outlook:
    known: dict[str, object] = {"grace_left": left, "rest_of_step": 1.0, "save_bytes": GB}
    return Outlook(**(known | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("predictor", "given_", "kind"),
    [
        # 1 s for the step, and 6.7 to 15 s for the save; a drain takes 5.3 to 12 s.
        pytest.param(KNOWN, outlook(1e6), FULL, id="plenty of time"),
        pytest.param(KNOWN, outlook(16.0), FULL, id="a save just fits"),
        pytest.param(KNOWN, outlook(15.9), FULL, id="a save may fit, no alternative"),
        pytest.param(KNOWN, outlook(7.5), NOTHING, id="a save cannot fit"),
        pytest.param(KNOWN, outlook(0.0), NOTHING, id="no time at all"),
        pytest.param(KNOWN, outlook(16.0, undrained_bytes=GB), FULL, id="both fit"),
        pytest.param(
            KNOWN, outlook(15.9, undrained_bytes=GB), DRAIN, id="only the drain certainly fits"
        ),
        pytest.param(
            KNOWN,
            outlook(7.0, undrained_bytes=GB // 2),
            DRAIN,
            id="half of the snapshot is drained already",
        ),
        pytest.param(
            KNOWN, outlook(11.0, undrained_bytes=GB), DRAIN, id="neither is certain: the quicker"
        ),
        pytest.param(KNOWN, outlook(5.0, undrained_bytes=GB), NOTHING, id="not even the drain"),
        pytest.param(
            KNOWN, outlook(0.1, undrained_bytes=0), DRAIN, id="only the seal is left to drain"
        ),
        # As time passes: a step or a save that is overdue is waited for while a drain still fits.
        pytest.param(
            KNOWN,
            outlook(30.0, undrained_bytes=GB, is_late=True),
            FULL,
            id="late, and time for both",
        ),
        pytest.param(
            KNOWN, outlook(18.0, undrained_bytes=GB, is_late=True), FULL, id="late, and some time"
        ),
        pytest.param(
            SLOW_DRAIN,
            outlook(25.0, undrained_bytes=GB, is_late=True),
            DRAIN,
            id="late, and the last moment for a drain",
        ),
        pytest.param(SLOW_DRAIN, outlook(25.0, undrained_bytes=GB), FULL, id="the same in time"),
        pytest.param(KNOWN, outlook(16.0, is_late=True), FULL, id="late, and nothing to drain"),
        pytest.param(
            KNOWN,
            outlook(5.1, undrained_bytes=GB // 4, saving_seconds=10.0),
            FULL,
            id="a save that has 5 s to go",
        ),
        pytest.param(
            KNOWN,
            outlook(4.9, undrained_bytes=GB // 4, saving_seconds=10.0),
            DRAIN,
            id="a save that began too late",
        ),
        pytest.param(
            KNOWN,
            outlook(40.0, undrained_bytes=GB, saving_seconds=20.0),
            FULL,
            id="a save that is overdue, and time",
        ),
        pytest.param(
            SLOW_DRAIN,
            outlook(25.0, undrained_bytes=GB, saving_seconds=20.0),
            DRAIN,
            id="a save that is overdue, and the last moment for a drain",
        ),
        pytest.param(
            KNOWN,
            outlook(5.0, undrained_bytes=GB, saving_seconds=20.0),
            FULL,
            id="a save that is overdue, and no time for a drain",
        ),
        # No or too few measurements.
        pytest.param(Predictor(), outlook(30.0), FULL, id="a first save"),
        pytest.param(
            Predictor(), outlook(30.0, undrained_bytes=GB), FULL, id="a first save with a snapshot"
        ),
        pytest.param(Predictor(), outlook(0.5), NOTHING, id="the step outlasts the grace"),
        pytest.param(
            Predictor(),
            outlook(0.5, undrained_bytes=GB),
            DRAIN,
            id="the step outlasts the grace, with a snapshot",
        ),
        pytest.param(
            knowing(memory=1.0), outlook(30.0, undrained_bytes=GB), FULL, id="never drained"
        ),
        pytest.param(DRAINED, outlook(16.0), FULL, id="the drain's speed stands in for the disk's"),
        pytest.param(DRAINED, outlook(7.5), NOTHING, id="the drain's speed rules a save out"),
        pytest.param(
            knowing(disk=10.0),
            outlook(15.5, undrained_bytes=GB),
            DRAIN,
            id="the disk's speed stands in for the drain's",
        ),
    ],
)
def test_the_choice(predictor: Predictor, given_: Outlook, kind: ChoiceKind) -> None:
    choice = choose(predictor, given_)
    assert choice.kind is kind, choice.why


HALF = GB // 2


@pytest.mark.parametrize(
    ("predictor", "given_", "kind"),
    [
        pytest.param(SLOW_DISK, outlook(60.0, peer_bytes=HALF), PEER, id="a peer has it sooner"),
        pytest.param(SLOW_DISK, outlook(60.0), FULL, id="no peer stays, or keeps anything"),
        pytest.param(SLOW_DISK, outlook(4.1, peer_bytes=HALF), PEER, id="the disk is too slow"),
        pytest.param(SLOW_DISK, outlook(2.5, peer_bytes=HALF), PEER, id="a peer may have it"),
        pytest.param(SLOW_DISK, outlook(2.2, peer_bytes=HALF), NOTHING, id="not even a peer"),
        pytest.param(
            FAST_DISK, outlook(60.0, peer_bytes=HALF), FULL, id="the disk is as fast, and durable"
        ),
        pytest.param(
            SLOW_DISK, outlook(60.0, save_bytes=GB // 20, peer_bytes=GB // 40), FULL,
            id="a small state: less than a second sooner",
        ),
        pytest.param(
            FAST_DISK, outlook(60.0, peer_bytes=4 * GB), FULL, id="the network is slower than it"
        ),
        pytest.param(
            SLOW_DISK, outlook(60.0, peer_bytes=HALF, undrained_bytes=0), PEER,
            id="rather than an older snapshot",
        ),
        pytest.param(
            SLOW_DISK, outlook(3.0, peer_bytes=HALF, undrained_bytes=GB // 5), DRAIN,
            id="a drain certainly fits, a peer may be too late",
        ),
        pytest.param(
            SLOW_DISK, outlook(60.0, peer_bytes=HALF, saving_seconds=1.0), FULL,
            id="the ranks write to the disk already",
        ),
        pytest.param(NO_DISK, outlook(30.0, peer_bytes=HALF), PEER, id="no drain has ended yet"),
        pytest.param(NO_DISK, outlook(2.5, peer_bytes=HALF), PEER, id="the same, and little time"),
        pytest.param(
            knowing(disk=10.0, memory=1.0), outlook(30.0, peer_bytes=HALF), FULL,
            id="no copy was ever made: no replicas, or the first save",
        ),
        pytest.param(
            knowing(disk=10.0, peer=2.0), outlook(30.0, peer_bytes=HALF), FULL,
            id="nothing was ever saved into memory",
        ),
        pytest.param(Predictor(), outlook(30.0, peer_bytes=HALF), FULL, id="nothing is known"),
    ],
)  # fmt: skip
def test_the_choice_where_a_peer_stays(
    predictor: Predictor, given_: Outlook, kind: ChoiceKind
) -> None:
    choice = choose(predictor, given_)
    assert choice.kind is kind, choice.why


@pytest.mark.parametrize(
    ("grace", "kind"),
    [
        pytest.param(60.0, FULL, id="time for the save and its upload"),
        pytest.param(30.0, DRAIN, id="an upload of the newest snapshot, and of nothing newer"),
        pytest.param(17.0, FULL, id="no upload can be in time: the disk has the most"),
        pytest.param(14.0, DRAIN, id="nor a save"),
    ],
)
def test_what_a_bucket_gets_in_time_goes_before_what_the_disk_gets(
    grace: float, kind: ChoiceKind
) -> None:
    """At worst a save takes 16 s, a drain 12 s, and the upload of either 15 s."""
    predictor = copy.deepcopy(KNOWN)
    predictor.observe(Route.UPLOAD, GB, 10.0)
    choice = choose(predictor, outlook(grace, undrained_bytes=GB, uploads=True))
    assert choice.kind is kind, choice.why
    assert ("before an upload of up to 15 s" in choice.why) is (grace >= 30)
    assert choose(KNOWN, outlook(grace, undrained_bytes=GB, uploads=True)) == choose(
        KNOWN, outlook(grace, undrained_bytes=GB)
    )


@pytest.mark.parametrize(
    ("predictor", "given_", "why", "seconds"),
    [
        (KNOWN, outlook(30.0), "a save to the disk takes up to 16 s, with 30 s left", 16.0),
        (
            KNOWN,
            outlook(14.0, undrained_bytes=GB),
            "a save to the disk takes up to 16 s, a drain of the newest snapshot takes up to 12 s, "
            "with 14 s left",
            12.0,
        ),
        (KNOWN, outlook(5.0), "a save to the disk takes up to 16 s, with 5 s left", 0.0),
        (
            Predictor(),
            outlook(30.0),
            "trying a save within 30 s: no write to the disk was measured yet",
            None,
        ),
        (
            KNOWN,
            outlook(10.0),
            "a save to the disk takes up to 16 s, with 10 s left: it may still fit",
            16.0,
        ),
        (
            SLOW_DISK,
            outlook(30.0, peer_bytes=HALF),
            "a save to the disk takes up to 16 s, a save into memory with a copy on a node that "
            "stays takes up to 4 s, with 30 s left",
            4.0,
        ),
    ],
)
def test_the_reason_names_the_durations(
    predictor: Predictor, given_: Outlook, why: str, seconds: float | None
) -> None:
    choice = choose(predictor, given_)
    assert (choice.why, choice.predicted_seconds) == (why, seconds)


# -- the oracle -------------------------------------------------------------------------------

rates = st.floats(0.01, 100.0)
margins = st.floats(MIN_MARGIN, MAX_MARGIN)
WORTH = {FULL: 2, PEER: 2, DRAIN: 1, NOTHING: 0}
"""The value of each action that finishes in time; one that is cut off keeps nothing."""


@st.composite
def situations(draw: st.DrawFn) -> tuple[Predictor, Outlook]:
    predictor = Predictor(
        {route: RouteModel(draw(rates) / GB, 1e-6, draw(margins)) for route in Route}
    )
    return predictor, Outlook(
        grace_left=draw(st.floats(0.0, 300.0)),
        rest_of_step=draw(st.floats(0.0, 20.0)),
        save_bytes=draw(st.integers(1, 4 * GB)),
        undrained_bytes=draw(st.none() | st.integers(1, 4 * GB)),
        peer_bytes=draw(st.none() | st.integers(1, 4 * GB)),
    )


def true_seconds(
    predictor: Predictor, outlook: Outlook, factors: dict[Route, float]
) -> dict[ChoiceKind, float]:
    """Return the duration of each action if each route takes ``factor`` times the expected one."""

    def seconds(route: Route, size: int) -> float:
        expected = predictor.expect(route, size)
        assert expected is not None
        return expected * factors[route]

    full = outlook.rest_of_step + seconds(Route.DISK, outlook.save_bytes)
    found = {NOTHING: 0.0, FULL: full}
    if outlook.undrained_bytes is not None:
        found[DRAIN] = seconds(Route.DRAIN, outlook.undrained_bytes)
    if outlook.peer_bytes is not None:
        save = outlook.rest_of_step + seconds(Route.MEMORY, outlook.save_bytes)
        found[PEER] = save + seconds(Route.PEER, outlook.peer_bytes)
    return found


def scenarios(predictor: Predictor, outlook: Outlook) -> Iterator[dict[Route, float]]:
    """Yield true costs within the margins: the ends, the middle, and where an action just fits."""
    choices: dict[Route, list[float]] = {Route.UPLOAD: [1.0]}
    for route in (Route.MEMORY, Route.PEER):
        margin = predictor.margin(route)
        choices[route] = [1 / margin, margin] if outlook.peer_bytes is not None else [1.0]
    for route in (Route.DISK, Route.DRAIN):
        margin = predictor.margin(route)
        factors = [1 / margin, 1.0, margin]
        for size, rest in (
            (outlook.save_bytes, outlook.rest_of_step),
            (outlook.undrained_bytes or 1, 0.0),
        ):
            expected = predictor.expect(route, size)
            assert expected is not None
            just = (outlook.grace_left - rest) / expected * (1 - 1e-9)
            factors += [just] if 1 / margin <= just <= margin else []
        choices[route] = factors
    for combined in product(*choices.values()):
        yield dict(zip(choices, combined, strict=True))


def worth(kind: ChoiceKind, seconds: dict[ChoiceKind, float], left: float) -> int:
    return WORTH[kind] if seconds[kind] <= left else 0


@settings(max_examples=300, derandomize=True, database=None)
@given(situations())
def test_no_other_action_dominates_the_choice(situation: tuple[Predictor, Outlook]) -> None:
    """No action is at least as good in every case within the margins and better in one."""
    predictor, given_ = situation
    choice = choose(predictor, given_)
    cases = [true_seconds(predictor, given_, factors) for factors in scenarios(*situation)]
    mine = [worth(choice.kind, case, given_.grace_left) for case in cases]
    for other in cases[0]:
        theirs = [worth(other, case, given_.grace_left) for case in cases]
        dominated = all(t >= m for t, m in zip(theirs, mine, strict=True)) and theirs != mine
        assert not dominated, (choice, other)


@settings(max_examples=300, derandomize=True, database=None)
@given(situations())
def test_a_choice_that_certainly_fits_finishes_in_time(
    situation: tuple[Predictor, Outlook],
) -> None:
    """If a whole save certainly fits, one is chosen."""
    predictor, given_ = situation
    choice = choose(predictor, given_)
    assume(choice.predicted_seconds is not None)
    worst = {route: predictor.margin(route) for route in Route}
    seconds = true_seconds(predictor, given_, worst)
    if min(seconds[FULL], seconds.get(PEER, math.inf)) <= given_.grace_left * (1 - 1e-9):
        assert choice.kind in (FULL, PEER)
    if "may still fit" not in choice.why and choice.kind is not NOTHING:
        assert seconds[choice.kind] <= given_.grace_left * (1 + 1e-9)


@settings(max_examples=300, derandomize=True, database=None)
@given(situations(), st.floats(0.0, 300.0))
def test_more_grace_never_keeps_less(situation: tuple[Predictor, Outlook], more: float) -> None:
    """At the worst costs, the notice with more time keeps at least as much."""
    predictor, given_ = situation
    longer = replace(given_, grace_left=given_.grace_left + more)
    worst = true_seconds(predictor, given_, {route: predictor.margin(route) for route in Route})

    def saved(at: Outlook, choice: EmergencyChoice) -> int:
        return worth(choice.kind, worst, at.grace_left * (1 + 1e-9))

    assert saved(longer, choose(predictor, longer)) >= saved(given_, choose(predictor, given_))
