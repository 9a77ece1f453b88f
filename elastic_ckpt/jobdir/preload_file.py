"""Which installed modules a job's workers were seen to import, kept from run to run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import PurePath
from typing import Final

import msgspec

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.files import read_bounded, write_atomic
from elastic_ckpt.util.text import printable

MAX_NAMES: Final = 2000
MAX_NAME_CHARACTERS: Final = 120
_MAX_BYTES: Final = 1024 * 1024
_MAX_REASON: Final = 200
_PACKAGES: Final = frozenset({"site-packages", "dist-packages"})


class Preload(msgspec.Struct, frozen=True):
    """What the template process imports before workers fork from it.

    Attributes:
        modules: their full names, in the order in which they were imported.
        harmful: those that it must not import, with the reasons; None if nobody has tried yet.
        refused: why none of them may be imported; empty if they may.
    """

    modules: tuple[str, ...] = ()
    harmful: dict[str, str] | None = None
    refused: str = ""


def read_preload(job: JobDirectory) -> Preload:
    """What earlier runs saw; of a file that is missing or no good, nothing."""
    try:
        if job.owns(job.control):
            data = read_bounded(job.preload, _MAX_BYTES)
            return _checked(msgspec.json.decode(data, type=Preload))
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        pass
    return Preload()


def write_preload(job: JobDirectory, preload: Preload) -> None:
    """Keep it for the next start. Rank 0 and the agent above it, and not at the same time.

    A disk that does not take it now costs the next start its speed, and nothing else.
    """
    with contextlib.suppress(OSError):
        if job.owns(job.control):
            write_atomic(job.preload, msgspec.json.encode(preload))


def is_module_name(name: str) -> bool:
    """Whether this is a dotted name, and one of a length that is kept."""
    return len(name) <= MAX_NAME_CHARACTERS and all(
        part.isascii() and part.isidentifier() for part in name.split(".")
    )


def is_installed(path: str, own: Iterable[str]) -> bool:
    """Whether a file or directory belongs to an installed package.

    Args:
        own: directories of the user's own code, absolute. One that lies among the packages is
            still the user's; packages that lie below one, in an environment, are not.
    """
    file = PurePath(path)
    parts = file.parts
    above = [PurePath(directory).parts for directory in own]
    below = [parts[len(top) :] for top in above if parts[: len(top)] == top]
    return file.is_absolute() and all(
        not _PACKAGES.isdisjoint(rest[:-1]) for rest in (parts, *below)
    )


def _checked(preload: Preload) -> Preload:
    harmful = preload.harmful
    for names in (preload.modules, harmful or {}):
        if len(names) > MAX_NAMES or not all(map(is_module_name, names)):
            raise ValueError("these are no names of modules")
    if harmful is not None:
        harmful = {name: printable(reason, _MAX_REASON) for name, reason in harmful.items()}
    return Preload(preload.modules, harmful, printable(preload.refused, _MAX_REASON))
