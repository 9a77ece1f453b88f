"""In the steady state a step makes no system call and keeps no memory."""

import ctypes
import os
import platform
import struct
import time
import tracemalloc

import pytest
import torch
from torch import nn

from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Phase
from elastic_ckpt.training.data.consumption import Consumption
from elastic_ckpt.training.step import StepProtocol
from elastic_ckpt.training.step_timer import StepTimer

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_FILTER_MODE = 2
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_LOAD_NUMBER = (0x20, 0, 0, 0)  # the system call's number is the first field that a filter reads
_WRITE = {"x86_64": 1, "aarch64": 64}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def allow_only_write() -> None:
    """From here on any other system call is the end of this process.

    Seccomp's ready-made strict mode will not do: it takes the time-stamp counter away, too.
    """
    lines = [
        _LOAD_NUMBER,
        (0x15, 0, 1, _WRITE[platform.machine()]),
        (0x06, 0, 0, _ALLOW),
        (0x06, 0, 0, _KILL),
    ]
    code = b"".join(struct.pack("HBBI", *line) for line in lines)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(lines), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_SECCOMP, _FILTER_MODE, ctypes.byref(program), 0, 0)


def survives_without_system_calls(action) -> bool:
    """Whether a child that may only write comes through the action."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        action()  # once before, for what only the first call needs
        allow_only_write()
        action()
        os.write(write, b"through")
        os._exit(0)  # not allowed either: the parent has read the message by then
    os.close(write)
    try:
        return os.read(read, 16) == b"through"
    finally:
        os.close(read)
        os.waitpid(child, 0)


def make_step():
    """What a Session does in a step of one micro-batch, hooks included."""
    board = Board.create(1)
    slot = board.rank_slot(0)
    protocol = StepProtocol(board, slot)
    protocol.attach(0)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    consumption = Consumption()
    consumption.watch(optimizer)
    consumption.begin()
    stepped = next(reversed(optimizer._optimizer_step_post_hooks.values()))
    timer = StepTimer(slot, model, consumption=consumption)

    def step(number, kept=board):  # the mapping must outlive this call
        protocol.enter(number, 1, number)
        slot.phase(Phase.FETCHING)
        timer.fetching()
        timer.fetched()
        slot.phase(Phase.TRAINING)
        consumption.handed += 1
        timer.handed_out()
        timer.gradient_ready()
        timer.optimizing()
        stepped(None, None, None)
        timer.taken_back()
        timer.stepped()

    step(0)
    return step


@pytest.mark.skipif(platform.machine() not in _WRITE, reason="the filter names no such machine")
def test_a_step_makes_no_system_call():
    def look_at_the_clock():
        for _ in range(1000):
            time.monotonic_ns()

    if not survives_without_system_calls(look_at_the_clock):
        pytest.skip("on this machine reading the clock is a system call itself")
    step = make_step()

    def thousand_steps():
        for number in range(1000):
            step(number)

    assert survives_without_system_calls(thousand_steps)


def test_the_check_can_fail():
    assert not survives_without_system_calls(os.getppid)


def test_a_step_keeps_no_memory():
    step = make_step()
    for number in range(1000):
        step(number)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(20_000):
            step(number)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 2_000  # a few objects at most, whatever the number of steps
