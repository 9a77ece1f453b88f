"""Whether the clock is kept right, as the kernel says."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import pytest

from elastic_ckpt.cli.doctor import machine as clock_findings
from elastic_ckpt.cli.doctor.machine import check_clock, is_synchronised


class Kernel:
    """A libc whose adjtimex answers so."""

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
        (0, 0x2001, "ok", "is synchronised"),
        (5, 0x0040, "warning", "nothing keeps it"),
        (-1, 0, "ok", "does not say"),
    ],
)
def test_the_kernels_word(
    monkeypatch: pytest.MonkeyPatch, returned: int, status: int, state: str, says: str
) -> None:
    kernel = Kernel(returned, status)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: kernel)
    found = check_clock()
    assert found.state == state and says in found.text
    assert kernel.modes == [0]  # it is asked, and not set


def test_a_libc_without_it_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert is_synchronised() is None


def test_this_kernel_is_asked_with_a_structure_that_is_its_own() -> None:
    """The kernel fills in all of it: what is behind the status is the time of day."""
    found = clock_findings._Timex()
    if ctypes.CDLL(None).adjtimex(ctypes.byref(found)) < 0:
        pytest.skip("the kernel does not say")
    seconds = ctypes.c_long.from_buffer(found, 72).value
    assert seconds == pytest.approx(time.time(), abs=100)
