"""Were the installed versions tried together? By what is installed, nothing of it is imported."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Final

import elastic_ckpt
from elastic_ckpt.cli.doctor.findings import Finding, ok

_OURS: Final = "elastic-ckpt"


def installed() -> dict[str, str]:
    """Versions by name; what is not installed is not in it."""
    found = {"Python": platform.python_version()}
    for name in (_OURS, *NAMES):
        if name == "Python":
            continue
        try:
            version: str | None = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if version:  # the remains of a package have none
            found[name] = version
    return found


def check_versions() -> Iterator[Finding]:
    """A finding for each, and one for whether they were tried together."""
    found = installed()
    yield ok(_OURS, found.get(_OURS, f"{elastic_ckpt.__version__}, from its source"))
    for name in NAMES:
        yield ok(name, found[name]) if name in found else _missing(name, found)
    if "torch" in found:
        yield _together(found)


def _missing(name: str, found: Versions) -> Finding:
    if name == "torch":
        return Finding(name, "problem", "is not installed", "pip install torch")
    if name == "colossalai":
        return ok(name, "not installed: scripts without it run")
    if "colossalai" not in found:
        return ok(name, "not installed: ColossalAI needs it, nothing else")
    todo = f"pip install {name}=={nearest_tried(found)[name]}: ColossalAI cannot be imported"
    return Finding(name, "warning", "not installed", todo)


def _together(found: Versions) -> Finding:
    differing = untried(found)
    if not differing:
        return ok("versions", "tried together")
    nearest = describe(nearest_tried(found), that_matter(found))
    others = ", ".join(f"{name} {found.get(name, 'not installed')}" for name in differing)
    todo = (
        f"the nearest that was tried: {nearest}; with yours, see first that a short run that you "
        "stop goes on as if you had not"
    )
    return Finding("versions", "warning", f"not tried with the others: {others}", todo)


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
