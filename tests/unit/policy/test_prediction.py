"""How the predictor learns the duration of a save."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ckpt.policy.prediction import (
    FIRST_MARGIN,
    MAX_MARGIN,
    MIN_MARGIN,
    Predictor,
    Route,
    RouteModel,
    rest_of_step,
)

GB = 10**9

sizes = st.integers(1, 2**60)
durations = st.floats(1e-6, 86400.0)


def after(*seconds: float, size: int = GB, route: Route = Route.DISK) -> Predictor:
    """Return a predictor that observed saves of one size."""
    predictor = Predictor()
    for each in seconds:
        predictor.observe(route, size, each)
    return predictor


def predict(predictor: Predictor, size: int) -> float:
    """Return the expected seconds with the margin."""
    expected = predictor.expect(Route.DISK, size)
    assert expected is not None
    return expected * predictor.margin(Route.DISK)


def test_nothing_is_predicted_without_a_measurement() -> None:
    predictor = Predictor()
    assert predictor.expect(Route.DISK, GB) is None
    assert predictor.margin(Route.DISK) == FIRST_MARGIN


def test_the_first_measurement_has_a_wide_margin() -> None:
    predictor = after(2.0)
    assert predictor.expect(Route.DISK, GB) == pytest.approx(2.0)
    assert predictor.margin(Route.DISK) == FIRST_MARGIN


@pytest.mark.parametrize(("size", "seconds"), [(2 * GB, 4.0), (GB // 2, 2.0), (0, 2.0), (-5, 2.0)])
def test_time_grows_with_size_and_never_falls_below_the_shortest_measured(
    size: int, seconds: float
) -> None:
    assert after(2.0).expect(Route.DISK, size) == pytest.approx(seconds)


def test_small_saves_are_faster_once_one_was_measured() -> None:
    predictor = after(2.0)
    predictor.observe(Route.DISK, 1000, 0.1)
    assert predictor.expect(Route.DISK, GB // 2) == pytest.approx(1.0)
    assert predictor.expect(Route.DISK, GB) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("size", "seconds"),
    [(0, 1.0), (-1, 1.0), (2**61, 1.0), (math.nan, 1.0), (math.inf, 1.0), (GB, 0.0), (GB, -1.0),
     (GB, math.nan), (GB, math.inf), (GB, 1e9), (GB, 1e-300)],
)  # fmt: skip
def test_an_implausible_measurement_is_ignored(size: float, seconds: float) -> None:
    predictor, untouched = after(2.0), after(2.0)
    predictor.observe(Route.DISK, size, seconds)
    assert predictor == untouched
    fresh = Predictor()
    fresh.observe(Route.DISK, size, seconds)
    assert fresh == Predictor()


@pytest.mark.parametrize(
    ("measured", "asked", "expected"),
    [
        (Route.DISK, Route.DRAIN, 2.0),  # both write to the same disk
        (Route.DRAIN, Route.DISK, 2.0),
        (Route.DISK, Route.MEMORY, 2.0),  # memory is at least as fast
        (Route.DRAIN, Route.MEMORY, 2.0),
        (Route.MEMORY, Route.DISK, None),  # a disk may be slower
        (Route.MEMORY, Route.DRAIN, None),
    ],
)
def test_an_unmeasured_route_uses_its_stand_in(
    measured: Route, asked: Route, expected: float | None
) -> None:
    assert after(2.0, route=measured).expect(asked, GB) == expected


def test_routes_learn_independently() -> None:
    predictor = after(2.0)
    predictor.observe(Route.MEMORY, GB, 0.1)
    assert predictor.expect(Route.MEMORY, GB) == pytest.approx(0.1)
    assert predictor.expect(Route.DISK, GB) == pytest.approx(2.0)


def test_a_late_save_widens_the_margin_at_once() -> None:
    predictor = after(*[2.0] * 30)
    before = predictor.margin(Route.DISK)
    predictor.observe(Route.DISK, GB, 6.0)
    assert predictor.margin(Route.DISK) > before * 1.2
    predicted = predict(predictor, GB)
    assert 6.0 * 0.999 <= predicted < 12.0


def test_good_predictions_narrow_the_margin_slowly_to_its_minimum() -> None:
    predictor = after(2.0)
    margins = []
    for _ in range(300):
        predictor.observe(Route.DISK, GB, 2.0)
        margins.append(predictor.margin(Route.DISK))
    assert margins == sorted(margins, reverse=True)
    assert margins[0] > FIRST_MARGIN * 0.95
    assert margins[-1] == pytest.approx(MIN_MARGIN, rel=1e-2)


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_a_permanent_change_of_bandwidth_is_followed(factor: float) -> None:
    """Within a dozen saves, in both directions, and without divergence."""
    predictor = after(*[2.0] * 20)
    for _ in range(12):
        predictor.observe(Route.DISK, GB, 2.0 * factor)
    expected = predictor.expect(Route.DISK, GB)
    assert expected is not None
    assert 0.9 < expected / (2.0 * factor) < 1.5


def test_saves_that_vary_by_a_quarter_are_predicted_long_enough() -> None:
    """At least nine of ten, and no prediction is more than twice the base duration."""
    predictor = after(2.0)
    took = [2.0 * (1 + 0.25 * math.sin(7 * number)) for number in range(200)]
    short = 0
    for seconds in took:
        predicted = predict(predictor, GB)
        short += predicted < seconds
        assert predicted < 4.0
        predictor.observe(Route.DISK, GB, seconds)
    assert short <= 20


@settings(max_examples=300, derandomize=True, database=None)
@given(st.lists(st.tuples(sizes, durations), min_size=1, max_size=30))
def test_a_prediction_is_never_below_the_last_measurement(
    measured: list[tuple[int, float]],
) -> None:
    """Unless the margin reached its maximum."""
    predictor = Predictor()
    for size, seconds in measured:
        predictor.observe(Route.DISK, size, seconds)
        predicted = predict(predictor, size)
        assert math.isfinite(predicted)
        margin = predictor.margin(Route.DISK)
        assert MIN_MARGIN <= margin <= MAX_MARGIN
        assert predicted >= seconds * 0.999 or margin == MAX_MARGIN
        assert predictor.checked() == predictor


@settings(max_examples=300, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from(Route), sizes, durations), max_size=20))
def test_a_predictor_survives_a_round_trip_through_json(
    measured: list[tuple[Route, int, float]],
) -> None:
    predictor = Predictor()
    for route, size, seconds in measured:
        predictor.observe(route, size, seconds)
    read = msgspec.json.decode(msgspec.json.encode(predictor), type=Predictor).checked()
    assert read == predictor


@pytest.mark.parametrize(
    "model",
    [RouteModel(0.0, 1.0), RouteModel(-1.0, 1.0), RouteModel(math.nan, 1.0),
     RouteModel(1e-320, 1.0), RouteModel(1e-9, 0.0), RouteModel(1e-9, math.inf),
     RouteModel(1e-9, 1.0, 0.5), RouteModel(1e-9, 1.0, 1e9)],
)  # fmt: skip
def test_implausible_models_in_a_file_are_dropped(model: RouteModel) -> None:
    good = RouteModel(1e-9, 1.0)
    read = Predictor({Route.DISK: model, Route.MEMORY: good}).checked()
    assert read == Predictor({Route.MEMORY: good})


@pytest.mark.parametrize(
    ("step", "elapsed", "rest"),
    [
        (2.0, 0.0, 2.0),
        (2.0, 1.5, 0.5),
        (2.0, 2.0, 0.0),
        (2.0, 2.5, 0.5),  # longer than usual: as long again as it is over its time
        (2.0, 60.0, 2.0),
        (2.0, -1.0, 2.0),
        (0.0, 1.0, 0.0),
        (math.nan, 1.0, 0.0),
        (math.inf, 1.0, 0.0),
    ],
)
def test_the_rest_of_a_step(step: float, elapsed: float, rest: float) -> None:
    assert rest_of_step(step, elapsed) == rest
