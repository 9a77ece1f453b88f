"""Is the clock right?"""

from __future__ import annotations

import ctypes
from typing import Final

from elastic_ckpt.cli.doctor.findings import Finding, ok

_UNSYNCHRONISED: Final = 0x0040
"""STA_UNSYNC of adjtimex(2)."""


class _Timex(ctypes.Structure):
    """The beginning of struct timex; ``modes`` of 0 only asks."""

    _fields_ = [
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 512),
    ]


def is_synchronised() -> bool | None:
    """Whether something keeps this host's clock right; None if the kernel does not say."""
    found = _Timex()
    try:
        if ctypes.CDLL(None).adjtimex(ctypes.byref(found)) < 0:
            return None
    except (OSError, AttributeError):
        return None
    return not found.status & _UNSYNCHRONISED


def check_clock() -> Finding:
    """Synchronised, or what may be off."""
    synchronised = is_synchronised()
    if synchronised is None:
        return ok("clock", "the kernel does not say whether it is synchronised")
    if synchronised:
        return ok("clock", "is synchronised")
    todo = (
        "run chrony or systemd-timesyncd; until then ages, SLURM's time limit and deadlines that "
        "a cloud gives as a time of day may be off, and nothing else"
    )
    return Finding("clock", "warning", "nothing keeps it synchronised", todo)
