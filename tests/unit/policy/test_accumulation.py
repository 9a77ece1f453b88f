"""Micro-batches per optimizer step for a global batch."""

import pytest

from elastic_ckpt.errors import UsageError
from elastic_ckpt.policy.accumulation import accumulation_steps, step_size_changed


@pytest.mark.parametrize(
    ("given", "steps"),
    [((24, 2, 4), 3), ((24, 2, 3), 4), ((24, 2, 1), 12), ((8, 8, 1), 1), ((6, 1, 6), 1)],
)
def test_the_global_batch_is_the_same_on_any_number_of_ranks(
    given: tuple[int, int, int], steps: int
) -> None:
    assert accumulation_steps(*given) == steps
    global_batch, batch_size, replicas = given
    assert steps * batch_size * replicas == global_batch


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ((16, 2, 3), "of 16 .* micro-batches of 2 on 3 ranks: use 1, 2, 4, 8 ranks$"),
        ((4, 8, 1), "on 1 rank: choose a multiple of 8$"),
        ((15, 2, 5), "choose a multiple of 10$"),
        ((720720, 1, 17), "use 1, 2, 3, 4, 5, 6, 7, 8 or more ranks$"),
    ],
)
def test_the_error_lists_rank_counts_that_work(given: tuple[int, int, int], advice: str) -> None:
    with pytest.raises(UsageError, match=advice):
        accumulation_steps(*given)


def test_changed_step_size_is_said_with_the_option_that_keeps_it() -> None:
    said = step_size_changed(64, 32)
    assert "32 samples instead of 64" in said and "--global-batch 64" in said
    assert step_size_changed(64, 64) == step_size_changed(0, 32) == step_size_changed(64, 0) == ""
