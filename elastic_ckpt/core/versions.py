"""Which versions of the packages below a training script were tried together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

Versions = Mapping[str, str]
"""By the names in ``NAMES``; what is not installed is not in it."""

NAMES: Final = ("Python", "torch", "colossalai", "transformers", "peft")

TRIED: Final[tuple[Versions, ...]] = (
    {
        "Python": "3.11",
        "torch": "2.5.1",
        "colossalai": "0.5.0",
        "transformers": "4.51.3",
        "peft": "0.13.2",
    },
    {
        "Python": "3.11",
        "torch": "2.13.0",
        "colossalai": "0.5.0",  # without its own pins, which forbid this torch
        "transformers": "4.51.3",
        "peft": "0.21.2",
    },
)
"""What passed all tests, newest last. Of Python the minor version counts. Without ColossalAI each
of these was tried, too."""

_ALONE: Final = ("Python", "torch")
"""All that matters to a script that does without ColossalAI."""


def that_matter(found: Versions) -> tuple[str, ...]:
    """The names of which a script needs a version that was tried."""
    return NAMES if "colossalai" in found else _ALONE


def nearest_tried(found: Versions) -> Versions:
    """What was tried and is most like it: in the number of versions, then in the versions."""
    return min(TRIED, key=lambda tried: _distance(found, tried))


def untried(found: Versions) -> list[str]:
    """The names whose versions differ from the nearest that was tried; none if all are alike."""
    return _differing(found, nearest_tried(found))


def describe(versions: Versions, names: tuple[str, ...] = NAMES) -> str:
    """``Python 3.11, torch 2.13.0``, in the order of ``names``."""
    return ", ".join(f"{name} {versions[name]}" for name in names if name in versions)


def _differing(found: Versions, tried: Versions) -> list[str]:
    return [
        name
        for name in that_matter(found)
        if _counted(name, found.get(name, "")) != _counted(name, tried[name])
    ]


def _distance(found: Versions, tried: Versions) -> tuple[int, list[int]]:
    """How many versions differ; then how far, with ColossalAI's before torch's before the rest."""
    names = ("colossalai", "torch", "transformers", "peft", "Python")
    apart = [
        abs(_number(found.get(name, "")) - _number(tried[name]))
        for name in names
        if name in that_matter(found)
    ]
    return len(_differing(found, tried)), apart


def _counted(name: str, version: str) -> str:
    """What of a version counts: not which build it is, and of Python not which patch."""
    public = version.partition("+")[0]
    return ".".join(public.split(".")[:2]) if name == "Python" else public


def _number(version: str) -> int:
    """One that grows with major, minor and patch; 0 for what is no version."""
    found = [int(digits) for digits in re.findall(r"\d{1,5}", version.partition("+")[0])]
    major, minor, patch = [*found, 0, 0, 0][:3]
    return (major * 100_000 + minor) * 100_000 + patch
