"""Where the metrics go: an HTTP server and a text file, in threads that the run never waits for."""

from __future__ import annotations

import glob
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, make_wsgi_app, write_to_textfile

from elastic_ckpt.supervisor.metrics.last_look import LastLook
from elastic_ckpt.util.files import set_mode
from elastic_ckpt.util.http_server import HttpServer, bracketed
from elastic_ckpt.util.journald import warning

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)


_TIMEOUT: Final = "HTTP_X_PROMETHEUS_SCRAPE_TIMEOUT_SECONDS"
"""What Prometheus, and whatever reads in its place, sends with each request."""


class MetricsServer(HttpServer):
    """Serves the metrics over HTTP."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.last_look = LastLook()
        app = _app(registry, self.last_look.looked)
        super().__init__((host, port), app, "--metrics", "metrics-server")

    @property
    def url(self) -> str:
        """Where the metrics are."""
        host, port = self.address
        return f"http://{bracketed(host)}:{port}/metrics"


def _app(registry: CollectorRegistry, looked: Callable[[], None]) -> Any:
    """Return the library's application, with errors in our log and not on the job's terminal."""
    app: Any = make_wsgi_app(registry)

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            found: Iterable[bytes] = app(environ, start_response)
        except Exception:
            log.exception("cannot collect the metrics")
            start_response("500 Internal Server Error", [])
            return [b"cannot collect the metrics: see elastic-ckpt logs --processes\n"]
        return _and_then(found, looked) if _TIMEOUT in environ else found

    return answer


def _and_then(found: Iterable[bytes], do: Callable[[], None]) -> Iterator[bytes]:
    """Yield an answer, and do something once all of it has been sent."""
    yield from found
    do()


EVERY_SECONDS: Final = 15.0
FILE_STOP_SECONDS: Final = 1.0


class MetricsFile:
    """A file for node_exporter, replaced every 15 seconds and once more at the end. A failure to
    write it is shown once."""

    def __init__(
        self, path: Path, registry: CollectorRegistry, show: Callable[[str], None]
    ) -> None:
        self._path = path
        self._registry = registry
        self._show = show
        self._problem = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-file", daemon=True)

    def start(self) -> None:
        """Write the file now, and then regularly."""
        self._thread.start()

    def stop(self) -> None:
        """Write the last state; gives up after a second on storage that hangs."""
        self._over.set()
        self._thread.join(FILE_STOP_SECONDS)

    def write(self) -> None:
        """Replace the file: a reader sees the old one or the new one. OSError if it cannot."""
        temporary = self._path.with_name(f".{self._path.name}.tmp")  # not collected: no .prom
        write_to_textfile(str(temporary), self._registry)
        set_mode(temporary, 0o644)  # whatever the umask: node_exporter is another user
        temporary.replace(self._path)

    def _run(self) -> None:
        for left in self._path.parent.glob(f".{glob.escape(self._path.name)}.tmp*"):
            left.unlink(missing_ok=True)  # by a run that was killed
        last = False
        while not last:
            last = self._over.is_set()
            try:
                self.write()
                self._problem = ""
            except OSError as error:
                self._report(error.strerror or str(error))
            except Exception:  # the job must train on
                log.exception("cannot write the metrics")
            if not last:
                self._over.wait(EVERY_SECONDS)

    def _report(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            self._show(warning(f"--metrics-file {self._path} cannot be written: {problem}"))
