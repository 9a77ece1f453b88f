"""Copies that continue while the caller computes, on the slowest and the fastest device."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import pytest
import torch

from elastic_ckpt.training.tensors.device_copy import DeviceCopies


class LateLane:
    """A device that does nothing before it must."""

    def __init__(self, device: torch.device) -> None:
        self._work: list[Callable[[], None]] = []

    def follow(self) -> None:
        """What the caller gave it is done at once here."""

    def run(self, act: Callable[[], None]) -> None:
        self._work.append(act)

    def hold_back(self) -> None:
        self.wait()

    def wait(self) -> None:
        for act in self._work:
            act()
        self._work.clear()


class EagerLane(LateLane):
    """A device that finishes before the caller continues."""

    def run(self, act: Callable[[], None]) -> None:
        act()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def begin(
    lane: type[LateLane], *tensors: torch.Tensor
) -> tuple[DeviceCopies, list[tuple[mmap.mmap, bytes]]]:
    """Copies of the tensors, each target with what must come to stand there."""
    copies, targets = DeviceCopies(lane), []
    for tensor in tensors:
        memory = mmap.mmap(-1, max(tensor.nbytes, 1))
        copies.add(memoryview(memory)[: tensor.nbytes], tensor)
        targets.append((memory, bits(tensor)))
    return copies, targets


def tensors() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [
        torch.randn(1000, 33),
        torch.randn(64, 8).t(),
        torch.randn(101, dtype=torch.bfloat16)[1:],
        torch.tensor(2.5, dtype=torch.float64),
        torch.randint(0, 2, (77,), dtype=torch.bool),
    ]


@pytest.mark.parametrize("lane", [LateLane, EagerLane])
def test_after_a_guard_the_tensors_may_be_modified(lane: type[LateLane]) -> None:
    sources = tensors()
    copies, targets = begin(lane, *sources)
    copies.guard()
    for tensor in sources:
        tensor.zero_()
    assert copies.finish()
    assert all(memory[: len(expected)] == expected for memory, expected in targets)


@pytest.mark.parametrize("number", range(5))
def test_a_modification_without_a_guard_is_detected(number: int) -> None:
    """Each kind, contiguous or not, whatever its width; one that was copied first is no loss."""
    sources = tensors()
    copies, _ = begin(LateLane, *sources)
    straight = sources[number].is_contiguous()
    base = sources[number] if straight else sources[number].t()
    base.view(-1).view(torch.uint8)[0] ^= 1
    assert copies.finish() is not straight  # else what is copied is of the right moment already


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.neg_(),
        lambda tensor: tensor.data.mul_(1.0000001),  # no version of the tensor counts this
        lambda tensor: tensor.view(-1)[3].fill_(torch.nan),
        lambda tensor: tensor.view(-1)[0].nextafter_(torch.tensor(9.0)),
    ],
)
def test_any_kind_of_modification_is_detected(change: Callable[[torch.Tensor], object]) -> None:
    tensor = torch.randn(999, 3)
    copies, _ = begin(LateLane, tensor)
    change(tensor)
    assert not copies.finish()


def test_nan_is_not_a_modification() -> None:
    tensor = torch.full((8,), torch.nan)
    copies, [(memory, expected)] = begin(LateLane, tensor)
    assert copies.finish() and memory[:] == expected


def test_finish_forgets_the_tensors() -> None:
    tensor = torch.ones(4)
    copies, _ = begin(LateLane, tensor)
    assert copies.finish()
    tensor.zero_()
    assert copies.finish()
