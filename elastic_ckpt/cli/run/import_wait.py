"""What a terminal shows while torch is imported, which takes seconds on a cold disk.

The time that it took last is kept in the user's cache, for the time left at the next start.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.cli.progress.live_line import LiveLine
from elastic_ckpt.util.files import read_bounded, write_atomic

LOOK_SECONDS: Final = 0.05
MAX_SECONDS: Final = 600.0
"""A start that takes longer waits for something else, which its own lines name."""

_MAX_BYTES: Final = 64 * 1024
_MAX_ENTRIES: Final = 100


class ImportStage(Enum):
    """How far the first start of the workers is."""

    YET_TO_BEGIN = "the supervisor has something else to do first"
    IMPORTING = "the template imports, and no worker runs"
    OVER = "a worker runs"


class ImportWait:
    """Shows on a terminal how long the imports take, in a thread of its own.

    Args:
        preload: what is imported besides torch.
    """

    def __init__(self, preload: Sequence[str]) -> None:
        tops = sorted({name.partition(".")[0] for name in preload} - {"torch"})
        self._key = ",".join(["torch", *tops])
        self._ends = threading.Event()
        self._line = LiveLine(f"elastic-ckpt: importing {' and '.join(['torch', *tops])}")
        self._thread: threading.Thread | None = None

    def begin(self, stage: Callable[[], ImportStage]) -> None:
        """Show the wait until ``stage`` says that it is over; nothing without a terminal."""
        if self._line.is_seen:
            self._thread = threading.Thread(
                target=self._watch, args=(stage,), name="import-wait", daemon=True
            )
            self._thread.start()

    def clear(self) -> None:
        """Remove the line before another one is printed; it comes back if the wait goes on."""
        self._line.clear()

    def end(self) -> None:
        """Stop to watch, whatever the workers do."""
        self._ends.set()
        if self._thread is not None:
            self._thread.join(1.0)

    def _watch(self, stage: Callable[[], ImportStage]) -> None:
        began, usual = 0.0, usual_seconds(self._key)
        seconds = 0.0
        with contextlib.suppress(OSError, ValueError):  # the board is closed
            while not self._ends.wait(LOOK_SECONDS) and seconds < MAX_SECONDS:
                now = stage()
                if now is ImportStage.YET_TO_BEGIN:
                    continue
                if not began:
                    began = time.monotonic()
                    self._line.begin()
                seconds = time.monotonic() - began
                if now is ImportStage.OVER:
                    remember_seconds(self._key, seconds)
                    break
                self._line.wait(usual)
        self._line.clear()


def _place() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home) / "elastic-ckpt" / "import-seconds.json"


def usual_seconds(key: str) -> float | None:
    """Return how long these imports took last; None if that is unknown."""
    return _known().get(key)


def remember_seconds(key: str, seconds: float) -> None:
    """Keep how long these imports took; without a cache, nothing."""
    known = dict(list(_known().items())[-_MAX_ENTRIES:]) | {key: seconds}
    with contextlib.suppress(OSError):
        place = _place()
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(place, msgspec.json.encode(known))


def _known() -> dict[str, float]:
    with contextlib.suppress(OSError, RuntimeError, msgspec.MsgspecError):
        return msgspec.json.decode(read_bounded(_place(), _MAX_BYTES), type=dict[str, float])
    return {}
