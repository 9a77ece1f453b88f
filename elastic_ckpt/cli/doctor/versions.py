"""Were the installed versions tried together? By what is installed, nothing of it is imported."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Final

import elastic_ckpt
from elastic_ckpt.cli.doctor.findings import Finding, ok
from elastic_ckpt.core.versions import (
    NAMES,
    Versions,
    describe,
    nearest_tried,
    that_matter,
    untried,
)

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
