"""Which ranks count as slow."""

from __future__ import annotations

import pytest

from elastic_ckpt.policy.straggler import stragglers


@pytest.mark.parametrize(
    ("busy", "step", "slow"),
    [
        ({}, 1.0, {}),
        ({0: 0.5}, 1.0, {}),
        ({0: 0.5, 1: 0.5}, 1.0, {}),
        ({0: 0.2, 1: 0.8}, 1.0, {1: 4.0}),
        ({0: 0.2, 1: 0.8, 2: 0.2, 3: 0.2}, 1.0, {1: 4.0}),
        ({0: 0.2, 1: 0.25, 2: 0.2}, 1.0, {}),  # a quarter more: not slow
        (
            {0: 0.010, 1: 0.020, 2: 0.010},
            1.0,
            {},
        ),  # twice as long, but too small a share of the step
        ({0: 0.0, 1: 0.8, 2: 0.0}, 1.0, {}),  # the others are unknown
        ({0: 0.2, 1: 0.8, 2: 0.8, 3: 0.2, 4: 0.2}, 1.0, {1: 4.0, 2: 4.0}),
    ],
)
def test_a_straggler_is_a_rank_that_others_wait_for(busy, step, slow) -> None:
    assert stragglers(busy, step) == pytest.approx(slow)
