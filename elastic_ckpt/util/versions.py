"""Which code runs: versions of Python and of packages, and the git revision of a script; and which
versions of this package work together in one run."""

from __future__ import annotations

import platform
import re
import subprocess
import sysconfig
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Final

from elastic_ckpt import __version__

PACKAGES: Final = ("torch", "colossalai", "transformers", "accelerate", "lightning", "torchtitan")

GIT_SECONDS: Final = 2.0
"""How long git may take: in a large tree on a slow disk it reads every file's time."""

_MAX_CHARACTERS: Final = 200


@cache
def versions() -> dict[str, str]:
    """Return the versions of this program, Python and the installed packages, without imports."""
    found = {"elastic-ckpt": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except (metadata.PackageNotFoundError, OSError, ValueError):
            continue
    return found


@cache
def revision(folder: Path) -> str:
    """Return ``git describe`` of the tree that holds a folder: ``v1.2-3-g0bb2e8f-dirty``.

    Empty without git or a repository, or if git does not answer in time. Git gets no hook or
    monitor to run, and takes no lock.
    """
    command = (
        "git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(folder), "describe",
        "--always", "--dirty", "--tags", "--abbrev=12",
    )  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=GIT_SECONDS, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return ""
    text = done.stdout.decode(errors="replace").strip()
    return text[:_MAX_CHARACTERS] if done.returncode == 0 and text.isprintable() else ""


def work_together(one: str, other: str) -> bool:
    """Whether processes of these two versions may exchange messages: the first two numbers are the
    same. What is on the disk is not concerned; readers of every released format stay."""
    return bool(_series(one)) and _series(one) == _series(other)


def _series(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()


def beside_python(program: str) -> str:
    """Return the path of a program of another package, or its name if it is not beside ours."""
    beside = Path(sysconfig.get_path("scripts")) / program
    return str(beside) if beside.exists() else program
