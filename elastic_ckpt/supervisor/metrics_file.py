"""The metrics as a file, for node_exporter's textfile collector; written in a thread of its own."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest

from elastic_ckpt.util.files import create_file, set_mode

log = logging.getLogger(__name__)

EVERY_SECONDS: Final = 15.0
STOP_SECONDS: Final = 1.0


class MetricsFile:
    """Replaced again and again, and once more at the end.

    Args:
        say: shows one line; why it cannot be written is said once.
    """

    def __init__(self, path: Path, registry: CollectorRegistry, say: Callable[[str], None]) -> None:
        self._path = path
        self._registry = registry
        self._say = say
        self._wrong = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-file", daemon=True)

    def start(self) -> None:
        """Write it now, and from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Write how it ended; does not wait for storage that hangs."""
        self._over.set()
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        last = False
        while not last:
            last = self._over.is_set()
            try:
                replace(self._path, generate_latest(self._registry))
                self._wrong = ""
            except OSError as error:
                self._complain(error.strerror or str(error))
            except Exception:  # whatever it is, the job trains on
                log.exception("the metrics cannot be written")
            if not last:
                self._over.wait(EVERY_SECONDS)

    def _complain(self, why: str) -> None:
        if why != self._wrong:
            self._wrong = why
            self._say(f"--metrics-file {self._path} cannot be written: {why}")


def replace(path: Path, data: bytes) -> None:
    """Write a file that everybody may read: whoever reads it sees the old one or the new one.

    It need not survive a power cut. What stands beside it meanwhile does not end in ``.prom``, or
    it would be collected.

    Raises:
        OSError: it cannot be.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a run that was killed
    fd = create_file(temporary)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            set_mode(file.fileno(), 0o644)  # node_exporter is another user
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
