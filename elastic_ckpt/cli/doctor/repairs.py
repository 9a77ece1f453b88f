"""What ``doctor --fix`` repairs: what killed commands left, and damage in the way of a start.

Nothing is deleted but what ``doctor`` itself has made; a damaged checkpoint is moved.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.catalog import newest_and_rejected
from elastic_ckpt.cli.doctor.directory import INSPECT_SECONDS, CheckedPath
from elastic_ckpt.cli.doctor.findings import Finding, ok
from elastic_ckpt.cli.doctor.storage_trial import PREFIX
from elastic_ckpt.cli.verify import move_aside
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import command_line
from elastic_ckpt.util.files import remove_tree
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answers

STALE_SECONDS: Final = 3600.0
"""A trial takes a minute at most; an older directory is of a command that was killed."""

_TRIAL: Final = re.compile(re.escape(PREFIX) + "[0-9a-f]{16}")


def check_leftovers(path: CheckedPath, *, fix: bool) -> Iterator[Finding]:
    """Check for what can be repaired safely, and repair it with ``fix``; bounded in time."""
    if not path.exists:
        return
    try:
        with answers(lambda: _look(Path(path.root), fix=fix), Finding, INSPECT_SECONDS) as found:
            yield from found
    except (NoAnswer, WorkFailed) as error:
        todo = "run as its owner, or check the storage"
        yield Finding("leftovers", "problem", f"{path.root}: {error}", todo)


def _look(root: Path, *, fix: bool) -> Generator[Finding, None, None]:
    todo = command_line("doctor", "--fix", root)
    trials = _stale_trials(root)
    names = ", ".join(one.name for one in trials)
    if trials and fix:
        for trial in trials:
            remove_tree(trial)
        yield ok("leftovers", f"fixed: removed {names}")
    elif trials:
        text = f"{names}: left by doctor commands that were killed"
        yield Finding("leftovers", "warning", text, f"{todo} removes it")
    job = JobDirectory.at(root)
    damaged = [
        one
        for one in newest_and_rejected(job)[1]
        if one.tier == "disk" and not one.foreign and one.own is None
    ]
    for one in damaged:
        text = f"{one.shown}: {one.why}"
        if fix:
            yield ok("damaged", f"fixed: {text}: set aside as {move_aside(one)}")
        else:
            yield Finding("damaged", "warning", text, f"{todo} sets it aside, as a start would")


def _stale_trials(root: Path) -> list[Path]:
    """Return trial directories of this user that no command can be using any more."""
    found = []
    for entry in os.scandir(root):
        if _TRIAL.fullmatch(entry.name) is None:
            continue
        status = entry.stat(follow_symlinks=False)
        is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if is_own and time.time() - status.st_mtime > STALE_SECONDS:
            found.append(Path(entry.path))
    return sorted(found)
