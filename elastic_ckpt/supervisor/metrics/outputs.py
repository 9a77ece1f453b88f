"""Where Prometheus fetches the metrics: HTTP, in threads that nobody waits for."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, generate_latest, make_wsgi_app

from elastic_ckpt.errors import UsageError
from elastic_ckpt.util.files import create_file, set_mode

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

AT_ONCE: Final = 8
"""Requests that are answered at a time; whoever comes then is hung up on."""

PATIENCE_SECONDS: Final = 5.0
"""For somebody who connects and says nothing, or does not take the answer."""

STOP_SECONDS: Final = 0.5


class MetricsServer:
    """Listens from the moment that it is made; answers from ``start`` on."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        """
        Args:
            port: 0 for any that is free.

        Raises:
            UsageError: one cannot listen there.
        """
        app: Any = make_wsgi_app(registry)

        def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            try:
                found: Iterable[bytes] = app(environ, start_response)
            except Exception:  # or its traceback would go to the job's terminal
                log.exception("the metrics cannot be told")
                start_response("500 Internal Server Error", [])
                return [b"the metrics cannot be told; the supervisor's log says why\n"]
            return found

        try:
            self._server = _Server(host, port)
        except OSError as error:
            shown = f"[{host}]" if ":" in host else host
            raise UsageError(
                f"--metrics {shown}:{port}: {error.strerror or error}: give another address, or "
                "port 0 for any that is free"
            ) from None
        self._server.set_app(answer)
        self._thread = threading.Thread(target=self._serve, name="metrics-server", daemon=True)

    @property
    def url(self) -> str:
        """Where the metrics are."""
        host, port = self._server.server_address[:2]
        shown = str(host)
        return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/metrics"

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more; the address is free then."""
        self._server.over.set()
        with contextlib.suppress(OSError):
            self._server.socket.shutdown(socket.SHUT_RDWR)  # ends the wait for the next one
        self._thread.join(STOP_SECONDS)
        self._server.server_close()

    def _serve(self) -> None:
        while not self._server.over.is_set():
            self._server.handle_request()


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE_SECONDS

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: it is no news that somebody looks."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 2 * AT_ONCE

    def __init__(self, host: str, port: int) -> None:
        self.over = threading.Event()
        self._free = threading.Semaphore(AT_ONCE)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        super().__init__(found[0][4][:2], _Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Without the host's name, which a name server that does not answer holds up."""
        TCPServer.server_bind(self)
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next one; where there are no more descriptors it is waited for one."""
        try:
            return super().get_request()
        except OSError:
            self.over.wait(0.2)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, if there may be one more."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has hung up, or never said what it wants."""
        log.info("%s was not answered", client_address, exc_info=True)


EVERY_SECONDS: Final = 15.0
FILE_STOP_SECONDS: Final = 1.0


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
        self._thread.join(FILE_STOP_SECONDS)

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
