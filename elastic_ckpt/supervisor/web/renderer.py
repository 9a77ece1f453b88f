"""Renders the live page in a process of its own, so that the run never waits for it."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

CACHE_SECONDS: Final = 1.0
"""How long a page is good for at least."""

SHARE: Final = 4.0
"""A page that took long is good for this many times as long: rendering takes a fifth of a core."""

RENDER_SECONDS: Final = 50.0
"""Time for one page, of a job with a long journal on slow storage and busy cores."""

_KILL_SECONDS: Final = 1.0
_END: Final = b"</html>"

# The working directory must not shadow the packages that the process imports.
_CODE: Final = (
    "import sys; sys.path[:1] = []; from elastic_ckpt.cli.report.live import main; main()"
)


def command_for(directory: Path) -> tuple[str, ...]:
    """Return the command that prints the page of a job."""
    return sys.executable, "-c", _CODE, str(directory)


class PageRenderer:
    """Renders at most one page at a time, and keeps the last one for a moment.

    Threads that ask meanwhile wait for the same page; each waits ``RENDER_SECONDS`` and a little
    at most. A process that storage holds in the kernel is left behind, and no second one is
    started next to it.
    """

    def __init__(self, command: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._command = command
        self._clock = clock
        self._lock = threading.Lock()
        self._page: bytes | None = None
        self._good_until = -1.0
        self._process: subprocess.Popen[bytes] | None = None
        self._is_over = False

    def page(self) -> bytes | None:
        """Return the page; None if it cannot be made now."""
        with self._lock:
            began = self._clock()
            if began >= self._good_until:
                self._page = self._render()
                took = self._clock() - began
                self._good_until = began + took + max(CACHE_SECONDS, SHARE * took)
            return self._page

    def stop(self) -> None:
        """Kill what is being rendered; nothing is rendered from now on."""
        self._is_over = True
        process = self._process
        if process is not None:
            with contextlib.suppress(OSError):
                process.kill()

    def _render(self) -> bytes | None:
        if self._is_over or (self._process is not None and self._process.poll() is None):
            return None
        try:
            process = self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1"),
            )
        except OSError as error:
            log.warning("cannot render the live page: %s", error)
            return None
        try:
            found, _ = process.communicate(timeout=RENDER_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("the live page was not rendered within %.0f s", RENDER_SECONDS)
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_SECONDS)
            return None
        if not found.rstrip().endswith(_END):  # the exit status may have gone to another wait
            log.warning("the live page was not rendered: exit code %s", process.returncode)
            return None
        return found
