"""Whether the clock synchronised."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import pytest

from elastic_ckpt.cli.doctor import machine as clock_findings
from elastic_ckpt.cli.doctor.machine import check_clock, is_synchronised


class Kernel:
    """A libc whose adjtimex returns given values."""

    def __init__(self, returned: int, status: int) -> None:
        self.returned, self.status = returned, status
        self.modes: list[int] = []

    def adjtimex(self, pointer: Any) -> int:
        found = pointer._obj
        self.modes.append(found.modes)
        found.status = self.status
        return self.returned


@pytest.mark.parametrize(
    ("returned", "status", "state", "says"),
    [
        (0, 0x2001, "ok", "synchronised"),
        (5, 0x0040, "warning", "not synchronised"),
        (-1, 0, "untried", "not reported"),
    ],
)
def test_the_kernels_answer(
    monkeypatch: pytest.MonkeyPatch, returned: int, status: int, state: str, says: str
) -> None:
    kernel = Kernel(returned, status)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: kernel)
    found = check_clock()
    assert found.state == state and says in found.text
    assert kernel.modes == [0]  # it is asked, and not set


def test_a_libc_without_adjtimex_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert is_synchronised() is None


def test_the_structure_matches_this_kernel() -> None:
    """The kernel fills in the whole structure: the time of day follows the status."""
    found = clock_findings._Timex()
    if ctypes.CDLL(None).adjtimex(ctypes.byref(found)) < 0:
        pytest.skip("the kernel does not say")
    seconds = ctypes.c_long.from_buffer(found, 72).value
    assert seconds == pytest.approx(time.time(), abs=100)
