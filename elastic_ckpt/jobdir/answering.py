"""Whether the storage of a directory answers: a dead file server blocks every call to it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final

from elastic_ckpt.errors import DirectoryUnusable, StopAborted
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answer
from elastic_ckpt.util.units import human_duration

ANSWER_SECONDS: Final = 10.0
"""How long a command waits for the storage of a directory."""

START_SECONDS: Final = 1800.0
"""How long the start of a run waits: a file server that restarts takes minutes."""

_TRY_SECONDS: Final = 3.0
"""Of the start, between two looks for a signal."""


def require_answer(directory: Path, seconds: float = ANSWER_SECONDS) -> None:
    """Return once the storage answers, whatever it says of the directory.

    The first call is made in a child process, which can be left behind: one that is stuck in the
    kernel cannot be interrupted.

    Raises:
        DirectoryUnusable: no answer within ``seconds``.
    """

    def look() -> Generator[bool, None, None]:
        with contextlib.suppress(OSError):
            _touch(directory)
        yield True

    try:
        answer(look, bool, seconds)
    except WorkFailed:  # the caller's own call says why
        return
    except NoAnswer:
        raise DirectoryUnusable(
            f"{directory} has not answered for {human_duration(seconds)}: fix its storage or "
            "mount, then repeat the command"
        ) from None


def wait_for_answer(
    directory: Path, say: Callable[[str], None], leaves: Callable[[], bool]
) -> None:
    """Wait until the storage answers; say so once it takes long.

    Args:
        say: shows one line to the user.
        leaves: whether this process was told to end.

    Raises:
        DirectoryUnusable: no answer within ``START_SECONDS``.
        StopAborted: ``leaves`` returned True.
    """
    limit = time.monotonic() + START_SECONDS
    said = False
    while True:
        try:
            require_answer(directory, _TRY_SECONDS)
            break
        except DirectoryUnusable:
            if time.monotonic() > limit:
                raise
        if leaves():
            raise StopAborted(
                f"a signal came while {directory} did not answer, nothing was started: fix its "
                "storage or mount, then rerun the same command"
            )
        if not said:
            bound = human_duration(START_SECONDS)
            say(f"{directory} does not answer: waiting up to {bound} for its storage")
            said = True
    if said:
        say(f"{directory} answers")


def _touch(directory: Path) -> None:
    os.stat(directory)
    os.listdir(directory)
