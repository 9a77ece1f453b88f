"""The environment variables of another interpreter than this process's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def environment_of(python: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which ``python`` is started, as after ``activate`` of its virtual
    environment: what a script starts by name comes from there. Unchanged if it is empty."""
    found = dict(environ)
    if not python:
        return found
    programs = Path(python).parent
    found["PATH"] = ":".join(filter(None, (str(programs), environ.get("PATH"))))
    found.pop("PYTHONHOME", None)  # this interpreter's standard library
    found.pop("VIRTUAL_ENV", None)
    if (programs.parent / "pyvenv.cfg").exists():
        found["VIRTUAL_ENV"] = str(programs.parent)
    return found
