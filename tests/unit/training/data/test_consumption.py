"""What the optimizers have consumed, where no backward pass can be seen, and across threads."""

import threading

import pytest
import torch
from torch import nn

from elastic_ckpt.errors import UsageError
from elastic_ckpt.training.data.consumption import Consumption


def watched() -> tuple[Consumption, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    consumption = Consumption()
    consumption.watch(optimizer)
    consumption.begin()
    return consumption, optimizer


@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("spacing", [1, 4])
def test_without_backward_passes_the_rhythm_of_the_steps_counts(first: int, spacing: int) -> None:
    consumption, optimizer = watched()
    ahead = max(0, first - spacing)
    for handed in range(1, first + 2 * spacing + 1):
        consumption.handed = handed
        if handed >= first and (handed - first) % spacing == 0:
            optimizer.step()
    assert consumption.ahead == ahead
    assert consumption.consumed == consumption.handed - ahead


def test_batches_that_another_thread_reads_are_an_error() -> None:
    consumption, optimizer = watched()
    reader = threading.Thread(target=consumption.begin)
    reader.start()
    reader.join()
    consumption.handed = 2
    with pytest.raises(UsageError, match="another thread"):
        optimizer.step()
