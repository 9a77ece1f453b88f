"""Whether the installed versions were tested together; nothing is imported to find out."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Final

import elastic_ckpt
from elastic_ckpt.cli.doctor.findings import Finding, ok
from elastic_ckpt.cli.run.interpreter import ask_python, check_python, find_python
from elastic_ckpt.errors import UsageError
from elastic_ckpt.util.versions import beside_python

_OURS: Final = "elastic-ckpt"


def installed(python: str = "") -> dict[str, str]:
    """Return the versions by name that are installed here, or in the environment of ``python``.

    Raises:
        UsageError: ``python`` does not answer.
    """
    if python:
        other = ask_python(python)
        ours = {_OURS: other.version} if other.version else {}
        return {"Python": ".".join(map(str, other.python)), **ours, **other.packages}
    found = {"Python": platform.python_version()}
    for name in (_OURS, *NAMES):
        if name == "Python":
            continue
        try:
            version: str | None = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if version:  # leftovers of a package have none
            found[name] = version
    return found


def check_versions(python: str = "") -> Iterator[Finding]:
    """Check each version, and whether they were tested together; those of the workers' Python."""
    if python:
        try:
            check_python(find_python(python))
            found = installed(find_python(python))
        except UsageError as error:
            yield Finding("--python", "problem", str(error), "elastic-ckpt run would end with 64")
            return
        yield ok("--python", "can run the workers")
    else:
        found = installed()
    yield ok(_OURS, found.get(_OURS, f"{elastic_ckpt.__version__}, from source"))
    for name in NAMES:
        yield ok(name, found[name]) if name in found else _missing(name, found)
    if "torch" in found:
        yield _together(found)
    yield _of_hangs()


def _of_hangs() -> Finding:
    """Check that the stacks of a hang can be read."""
    if shutil.which(beside_python("py-spy")) is not None:
        return ok("py-spy", "its program is installed")
    todo = "reinstall the package py-spy; without it a hang has no stacks, and may name no rank"
    return Finding("py-spy", "warning", "its program is not installed", todo)


def _missing(name: str, found: Versions) -> Finding:
    if name == "torch":
        todo = "pip install torch, or name the Python that has it: --python PATH"
        return Finding(name, "problem", "not installed", todo)
    if name == "colossalai":
        return ok(name, "not installed; only needed by scripts that use it")
    if "colossalai" not in found:
        return ok(name, "not installed; only needed by ColossalAI")
    todo = f"pip install {name}=={nearest_tested(found)[name]}, which ColossalAI needs"
    return Finding(name, "warning", "not installed", todo)


def _together(found: Versions) -> Finding:
    differing = untested(found)
    if not differing:
        return ok("versions", "tested together")
    nearest = describe(nearest_tested(found), relevant_names(found))
    others = ", ".join(f"{name} {found.get(name, 'not installed')}" for name in differing)
    todo = (
        f"install the nearest tested versions ({nearest}), or check with a short run that stopping "
        "and resuming works with yours"
    )
    return Finding("versions", "warning", f"not tested with the others: {others}", todo)


Versions = Mapping[str, str]
"""Installed versions, by the names in ``NAMES``."""

NAMES: Final = ("Python", "torch", "colossalai", "transformers", "peft")

TESTED: Final[tuple[Versions, ...]] = (
    dict(zip(NAMES, ("3.11", "2.5.1", "0.5.0", "4.51.3", "0.13.2"), strict=True)),
    # Without ColossalAI's own pins, which forbid this torch.
    dict(zip(NAMES, ("3.11", "2.13.0", "0.5.0", "4.51.3", "0.21.2"), strict=True)),
)
"""Versions that passed all tests, newest last, each also without ColossalAI. For Python the minor
version counts."""

_ALONE: Final = ("Python", "torch")
"""What matters to a script without ColossalAI."""


def relevant_names(found: Versions) -> tuple[str, ...]:
    """Return the names whose versions matter to a script."""
    return NAMES if "colossalai" in found else _ALONE


def nearest_tested(found: Versions) -> Versions:
    """Return the tested versions with the fewest and smallest differences."""
    return min(TESTED, key=lambda tried: _distance(found, tried))


def untested(found: Versions) -> list[str]:
    """Return the names whose versions differ from the nearest tested ones."""
    return _differing(found, nearest_tested(found))


def describe(versions: Versions, names: tuple[str, ...] = NAMES) -> str:
    """Return, for example, ``Python 3.11, torch 2.13.0``, in the order of ``names``."""
    return ", ".join(f"{name} {versions[name]}" for name in names if name in versions)


def _differing(found: Versions, tried: Versions) -> list[str]:
    return [
        name
        for name in relevant_names(found)
        if _counted(name, found.get(name, "")) != _counted(name, tried[name])
    ]


def _distance(found: Versions, tried: Versions) -> tuple[int, list[int]]:
    """Return how many versions differ, and how far, starting with ColossalAI's and torch's."""
    names = ("colossalai", "torch", "transformers", "peft", "Python")
    apart = [
        abs(_number(found.get(name, "")) - _number(tried[name]))
        for name in names
        if name in relevant_names(found)
    ]
    return len(_differing(found, tried)), apart


def _counted(name: str, version: str) -> str:
    """Return the part of a version that counts: no build, and for Python no patch."""
    public = version.partition("+")[0]
    return ".".join(public.split(".")[:2]) if name == "Python" else public


def _number(version: str) -> int:
    """Return a number that grows with major, minor and patch; 0 if it is not a version."""
    found = [int(digits) for digits in re.findall(r"\d{1,5}", version.partition("+")[0])]
    major, minor, patch = [*found, 0, 0, 0][:3]
    return (major * 100_000 + minor) * 100_000 + patch
