"""How many micro-batches make a step of a given size."""

import pytest

from elastic_ckpt.errors import UsageError
from elastic_ckpt.policy.accumulation import accumulation_steps


@pytest.mark.parametrize(
    ("given", "steps"),
    [((24, 2, 4), 3), ((24, 2, 3), 4), ((24, 2, 1), 12), ((8, 8, 1), 1), ((6, 1, 6), 1)],
)
def test_a_step_has_its_size_on_any_ranks(given: tuple[int, int, int], steps: int) -> None:
    assert accumulation_steps(*given) == steps
    global_batch, batch_size, replicas = given
    assert steps * batch_size * replicas == global_batch


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ((16, 2, 3), "of 16 .* micro-batches of 2 on 3 ranks: it can on 1, 2, 4, 8$"),
        ((4, 8, 1), "on 1 rank: choose a multiple of 8$"),
        ((15, 2, 5), "choose a multiple of 10$"),
        ((720720, 1, 17), "on 1, 2, 3, 4, 5, 6, 7, 8 or more$"),
    ],
)
def test_one_that_does_not_fit_says_what_does(given: tuple[int, int, int], advice: str) -> None:
    with pytest.raises(UsageError, match=advice):
        accumulation_steps(*given)
