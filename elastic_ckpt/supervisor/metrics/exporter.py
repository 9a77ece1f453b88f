"""A run's metrics, for Prometheus: fetched from an address, or from a file, or neither.

Nothing of it runs in the supervisor's loop, and the library is imported only where somebody asks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.supervisor.run_record import Account
from elastic_ckpt.supervisor.settings import RunSettings

if TYPE_CHECKING:
    from elastic_ckpt.supervisor.metrics.journal_follower import JournalFeed
    from elastic_ckpt.supervisor.metrics.outputs import MetricsFile, MetricsServer

_ADDRESS: Final = re.compile(r"(?:(?:\[([0-9A-Fa-f:.]+)\]|([^][:\s]+)):)?([0-9]{1,5})")

DEFAULT_HOST: Final = "127.0.0.1"
SUFFIX: Final = ".prom"
LAST_LOOK_SECONDS: Final = 0.5


class Metrics:
    """One for a run; does nothing where nobody asked for metrics."""

    def __init__(
        self, settings: RunSettings, job: JobDirectory, board: Board, account: Account
    ) -> None:
        """Listen, if that was asked for.

        Raises:
            UsageError: one cannot listen there.
        """
        self._feed: JournalFeed | None = None
        self._server: MetricsServer | None = None
        self._file: MetricsFile | None = None
        if settings.metrics is None and settings.metrics_file is None:
            return
        from prometheus_client import CollectorRegistry

        from elastic_ckpt.supervisor.metrics.collector import NodeCollector
        from elastic_ckpt.supervisor.metrics.journal_follower import JournalFeed
        from elastic_ckpt.supervisor.metrics.outputs import MetricsFile, MetricsServer

        if account.record.leads:
            self._feed = JournalFeed(job, settings.node)
        registry = CollectorRegistry()
        registry.register(NodeCollector(board, account, self._feed))
        if settings.metrics is not None:
            self._server = MetricsServer(*settings.metrics, registry)
            account.say(f"metrics: {self._server.url}")
        if settings.metrics_file is not None:
            self._file = MetricsFile(settings.metrics_file, registry, account.say)

    def start(self) -> None:
        """Tell them from now on."""
        for part in (self._feed, self._server, self._file):
            if part is not None:
                part.start()

    def stop(self) -> None:
        """The run is over, and its last event written; bounded, whatever the storage does."""
        if self._feed is not None:
            self._feed.look(LAST_LOOK_SECONDS)
        for part in (self._file, self._server, self._feed):
            if part is not None:
                part.stop()


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of PORT, HOST:PORT or [IPV6]:PORT.

    Raises:
        UsageError: it is none of these.
    """
    found = _ADDRESS.fullmatch(text.strip())
    if found is None or int(found[3]) > 65535:
        raise UsageError(f"--metrics {text!r} is no PORT, HOST:PORT or [IPV6]:PORT")
    return found[1] or found[2] or DEFAULT_HOST, int(found[3])


def check_file(path: Path) -> Path:
    """Where the metrics are to be written, seen from anywhere.

    Raises:
        UsageError: node_exporter would not read it.
    """
    if path.suffix != SUFFIX:
        raise UsageError(f"--metrics-file {path}: its name must end in {SUFFIX}")
    return path.absolute()
