"""Copies from a CUDA device into a file: the bits are those of the moment of the call."""

import mmap

import pytest
import torch

from elastic_ckpt.checkpoint.memory.mapped_file import Mappings
from elastic_ckpt.training.tensors.device_copy import DeviceCopies, pin, unpin, write_from_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


class Mapped:
    """A sink that hands out its pages, as the memory tier's files do."""

    def __init__(self, size):
        self.pages = mmap.mmap(-1, size)
        self._at = 0

    def take(self, count):
        view = memoryview(self.pages)[self._at : self._at + count]
        self._at += count
        return view

    def contents(self):
        return bytes(self.pages[: self._at])


class Streamed:
    """A sink that is only written to, as the disk's files are."""

    def __init__(self, size):
        self._data = bytearray()

    def write(self, data):
        self._data += bytes(data)

    def contents(self):
        return bytes(self._data)


SINKS = pytest.mark.parametrize("sink", [Mapped, Streamed])
SIZE = 80 * 1024 * 1024  # more than two of the buffers that it goes through


def bits(tensor):
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@SINKS
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(SIZE // 4, device="cuda"),
        lambda: torch.randn(1000, 333, device="cuda").t(),
        lambda: torch.randn(7, device="cuda", dtype=torch.bfloat16)[1:],
        lambda: torch.tensor(3.5, device="cuda"),
    ],
    ids=["large", "transposed", "odd view", "0-dim"],
)
def test_file_holds_the_exact_tensor(sink, make):
    tensor = make()
    file = sink(max(tensor.nbytes, 1))
    write_from_device(file, tensor)
    assert file.contents() == bits(tensor)


@SINKS
def test_change_after_the_call_is_not_in_the_file(sink):
    tensor = torch.randn(SIZE // 4, device="cuda")
    before = bits(tensor)
    file = sink(SIZE)
    write_from_device(file, tensor)
    tensor.zero_()
    torch.cuda.synchronize()
    assert file.contents() == before


@SINKS
def test_work_queued_before_the_call_is_in_the_file(sink):
    tensor = torch.zeros(SIZE // 4, device="cuda")
    busy = torch.randn(2048, 2048, device="cuda")
    for _ in range(50):
        busy = busy @ busy
        busy /= busy.norm()
    tensor.add_(1.0)
    file = sink(SIZE)
    write_from_device(file, tensor)
    assert file.contents() == bits(torch.ones(SIZE // 4))


def busy(seconds=0.2):
    """Queue work that delays everything queued after it on the current stream."""
    torch.cuda._sleep(int(seconds * 1.5e9))


@pytest.fixture
def pinned(tmp_path):
    """Pages of a file, registered as the memory tier registers them."""
    torch.cuda.init()
    mappings = Mappings(pin, unpin)
    with_file = mappings.open(tmp_path / "pages", SIZE)
    yield with_file.take(SIZE)
    with_file.close()


def test_a_mapping_is_pinned(pinned):
    assert torch.frombuffer(pinned, dtype=torch.uint8).is_pinned()


def test_concurrent_copy_has_the_state_at_its_call(pinned):
    tensor = torch.zeros(SIZE // 4, device="cuda")
    busy()
    tensor.add_(1.0)  # queued, not done
    copies = DeviceCopies()
    copies.add(pinned, tensor)
    tensor @ tensor  # reads it, meanwhile
    copies.guard()
    tensor.add_(1.0)
    assert copies.finish()
    assert bytes(pinned) == bits(torch.ones(SIZE // 4))


def test_unguarded_write_is_detected_or_too_late(pinned):
    """Twenty times, each with the write a little later."""
    noticed = 0
    for turn in range(20):
        tensor = torch.ones(SIZE // 4, device="cuda")
        copies = DeviceCopies()
        copies.add(pinned, tensor)
        if turn:
            busy(turn * 0.001)
        tensor.add_(1.0)
        complete = copies.finish()
        noticed += not complete
        assert not complete or bytes(pinned) == bits(torch.ones(SIZE // 4))
    assert noticed
