"""A progress bar with percentage, rate and time left, for work of more than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from elastic_ckpt.util.progress import QUIET_SECONDS, Advance, Watch, unwatched

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def progress_bar() -> Iterator[Watch]:
    """Show bars on standard error if that is a terminal, removed at the end; else nothing."""
    if not sys.stderr.isatty():
        yield unwatched
        return
    bars = _Bars()
    try:
        yield bars.watch
    finally:
        bars.stop()


class _Bars:
    """Rich's bars, created only after two seconds of work."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._began = time.monotonic()

    def watch(self, what: str, total: int) -> Advance:
        task = None
        done = 0

        def advance(count: int) -> None:
            nonlocal task, done
            done += count
            if self._progress is None and time.monotonic() - self._began < QUIET_SECONDS:
                return
            progress = self._shown()
            if task is None:
                task = progress.add_task(what, total=total)
            progress.update(task, completed=done, visible=done < total)

        return advance

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _shown(self) -> Progress:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(None), TaskProgressColumn(),
                DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
                console=Console(stderr=True), transient=True, expand=True,
            )  # fmt: skip
            self._progress.start()
        return self._progress
