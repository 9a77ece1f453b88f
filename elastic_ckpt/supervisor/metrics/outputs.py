"""Where the metrics go: an HTTP server and a text file, in threads that the run never waits for."""

from __future__ import annotations

import glob
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app, write_to_textfile
from prometheus_client.exposition import ThreadingWSGIServer

from elastic_ckpt.errors import UsageError
from elastic_ckpt.supervisor.metrics.last_look import LastLook
from elastic_ckpt.util.files import set_mode
from elastic_ckpt.util.journald import warning

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

MAX_READERS: Final = 8
"""Requests answered at a time; a connection above that is closed."""

PATIENCE_SECONDS: Final = 5.0
"""How long a connection may send nothing, or leave the answer unread."""

_TIMEOUT: Final = "HTTP_X_PROMETHEUS_SCRAPE_TIMEOUT_SECONDS"
"""What Prometheus, and whatever reads in its place, sends with each request."""

_POLL_SECONDS: Final = 0.1
"""How long ``stop`` waits for the server at most."""


class MetricsServer:
    """Serves the metrics over HTTP. The port (0: any free one) is taken at once, or UsageError, and
    answered from ``start`` on."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.last_look = LastLook()
        try:
            app = _app(registry, self.last_look.looked)
            self._server = make_server(host, port, app, _Server, _RequestHandler)
        except OSError as error:
            raise UsageError(
                f"--metrics {_bracketed(host)}:{port}: {error.strerror or error}: give another "
                "address, or port 0 for any free port"
            ) from None
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,),
            name="metrics-server", daemon=True,
        )  # fmt: skip

    @property
    def url(self) -> str:
        """Where the metrics are."""
        host, port = self._server.server_address[:2]
        return f"http://{_bracketed(str(host))}:{port}/metrics"

    def start(self) -> None:
        """Start to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering and free the port; open connections end with the process."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


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


class _RequestHandler(WSGIRequestHandler):
    def setup(self) -> None:
        """Set the time limit of the connection."""
        super().setup()
        self.connection.settimeout(PATIENCE_SECONDS)

    def log_message(self, format: str, *args: object) -> None:
        """Log no requests."""


class _Server(ThreadingWSGIServer):
    """The library's server, limited so that its readers cannot use up the supervisor's files."""

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self._readers: set[Any] = set()
        self.address_family, *_, bound = socket.getaddrinfo(
            *address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        super().__init__(bound[:2], handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Bind without looking up the host's name, which can hang on a name server."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether there is room for one more reader."""
        if len(self._readers) >= MAX_READERS:
            return False
        self._readers.add(request)
        return True

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, served or refused."""
        self._readers.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that a reader hung up or timed out."""
        log.info("%s was not answered", client_address, exc_info=True)


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
