"""Which versions of this package work together in one run."""

from __future__ import annotations

import re


def work_together(one: str, other: str) -> bool:
    """Whether processes of these two versions may exchange messages: the first two numbers are the
    same. What is on the disk is not concerned; readers of every released format stay."""
    return bool(_series(one)) and _series(one) == _series(other)


def _series(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()
