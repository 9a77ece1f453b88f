"""The units in this package, and the files that installing them writes.

An installed file begins with a line that has a digest of the rest, which tells a file that a user
changed from one of another version.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

from elastic_ckpt import __version__
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.run_command import PROGRAM
from elastic_ckpt.util.files import read_bounded

UNIT: Final = "elastic-ckpt@.service"
_MAX_BYTES: Final = 1024 * 1024
_MARK: Final = re.compile(rb"# Installed by elastic-ckpt \S+, sha256 ([0-9a-f]{64})\n")
_PATH: Final = re.compile(r"^Environment=PATH=/opt/elastic-ckpt/bin:(.*)$", re.MULTILINE)

_SYSTEM: Final[Mapping[str, str]] = {
    UNIT: "etc/systemd/system/elastic-ckpt@.service",
    "elastic-ckpt.sysusers": "etc/sysusers.d/elastic-ckpt.conf",
    "elastic-ckpt.tmpfiles": "etc/tmpfiles.d/elastic-ckpt.conf",
}
_PACKAGED: Final = "usr/lib/systemd/system/elastic-ckpt@.service"


@dataclass(frozen=True)
class UnitFile:
    """One file to install: its path, and its contents with the line that marks it as ours."""

    path: Path
    data: bytes

    @property
    def found(self) -> bytes | None:
        """What is at its path now; None if nothing is."""
        try:
            return read_bounded(self.path, _MAX_BYTES)
        except FileNotFoundError:
            return None

    @property
    def is_changed(self) -> bool:
        """Whether what is there is neither as some version wrote it nor what this one writes."""
        found = self.found
        if found is None:
            return False
        mark = _MARK.match(found)
        ours = self.data.partition(b"\n")[2]
        return found != ours and not (mark and mark[1] == _digest(found[mark.end() :]))


def program_directory() -> Path:
    """Return the directory of this installation's command.

    Raises:
        UsageError: there is none.
    """
    beside = Path(sys.executable).with_name(PROGRAM)
    found = str(beside) if beside.exists() else shutil.which(PROGRAM)
    if found is None:
        raise UsageError(f"no command {PROGRAM} beside {sys.executable} or on PATH: install it")
    return Path(found).absolute().parent


def system_files(root: Path, programs: Path) -> list[UnitFile]:
    """Return the files of the system scope below ``root``; services start ``programs``' command."""
    return [_unit_file(name, root / path, programs) for name, path in _SYSTEM.items()]


def user_files(programs: Path) -> list[UnitFile]:
    """Return the files of this user's scope."""
    return [_unit_file(f"user/{UNIT}", user_home() / "systemd/user" / UNIT, programs)]


def user_home() -> Path:
    """Return the user's directory of configurations, as systemd's ``%E``."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")


def packaged_unit(root: Path) -> Path | None:
    """Return the unit that a package of the system installed, if there is one."""
    path = root / _PACKAGED
    return path if path.exists() else None


def hidden_by(path: Path) -> Path | None:
    """Return the part of a path that other users may not pass; None if they reach all of it."""
    for part in (path, *path.parents):
        if not part.stat().st_mode & stat.S_IXOTH:
            return part
    return None


def _unit_file(name: str, path: Path, programs: Path) -> UnitFile:
    text = (files("elastic_ckpt.cli.systemd") / "units" / name).read_text(encoding="utf-8")
    rest = _PATH.sub(lambda match: _environment(programs, match[1]), text).encode()
    mark = f"# Installed by elastic-ckpt {__version__}, sha256 {_digest(rest).decode()}\n"
    return UnitFile(path, mark.encode() + rest)


def _environment(programs: Path, others: str) -> str:
    """Return the line that sets PATH; systemd expands % and takes quotes and backslashes away."""
    names = [str(programs), *(one for one in others.split(":") if one != str(programs))]
    value = ":".join(names).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'Environment="PATH={value}"'


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
