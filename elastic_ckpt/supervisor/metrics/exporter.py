"""A run's metrics for Prometheus: served at an address, written to a file, both or neither.

Nothing here runs in the supervisor's loop, and the library is imported only for a run with metrics.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.supervisor.run_record import RunRecord
from elastic_ckpt.supervisor.settings import RunSettings

if TYPE_CHECKING:
    from elastic_ckpt.supervisor.metrics.journal_follower import JournalFollower
    from elastic_ckpt.supervisor.metrics.last_look import LastLook
    from elastic_ckpt.supervisor.metrics.outputs import MetricsFile, MetricsServer

SUFFIX: Final = ".prom"
LAST_LOOK_SECONDS: Final = 0.5


class Metrics:
    """The metrics of one run; does nothing unless the settings ask for them. UsageError if the
    address cannot be listened on."""

    def __init__(
        self, settings: RunSettings, job: JobDirectory, board: Board, record: RunRecord
    ) -> None:
        self._feed: JournalFollower | None = None
        self._record = record
        self._last_look: LastLook | None = None
        self._parts: list[JournalFollower | MetricsServer | MetricsFile] = []  # in order of start
        if settings.metrics is None and settings.metrics_file is None:
            return
        from prometheus_client import CollectorRegistry

        from elastic_ckpt.supervisor.metrics.collector import NodeCollector
        from elastic_ckpt.supervisor.metrics.journal_follower import JournalFollower
        from elastic_ckpt.supervisor.metrics.outputs import MetricsFile, MetricsServer

        if record.node.leads:
            self._feed = JournalFollower(job, settings.node)
            self._parts.append(self._feed)
        registry = CollectorRegistry()
        registry.register(NodeCollector(board, record, self._feed))
        if settings.metrics is not None:
            server = MetricsServer(*settings.metrics, registry)
            self._parts.append(server)
            self._last_look = server.last_look
            record.say(f"metrics: {server.url}")
        if settings.metrics_file is not None:
            self._parts.append(MetricsFile(settings.metrics_file, registry, record.say))

    def start(self) -> None:
        """Start to follow the journal, to serve and to write."""
        for part in self._parts:
            part.start()

    def stop(self) -> None:
        """Stop, after the run's last event is written; bounded even when the storage hangs."""
        if self._feed is not None:
            self._feed.look(LAST_LOOK_SECONDS)
        if self._last_look is not None and self._record.state is RunState.FINISHED:
            with self._last_look.ended_by_signals():
                self._last_look.wait()
        for part in reversed(self._parts):
            part.stop()


def check_file(path: Path) -> Path:
    """Return its absolute path; UsageError for a name that node_exporter would not read."""
    if path.suffix != SUFFIX:
        raise UsageError(f"--metrics-file {path}: the name must end in {SUFFIX}")
    return path.absolute()
