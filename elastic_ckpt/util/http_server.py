"""A small HTTP server for one application, limited so that readers cannot harm its process."""

from __future__ import annotations

import logging
import re
import socket
import threading
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from elastic_ckpt.errors import UsageError

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

log = logging.getLogger(__name__)

DEFAULT_HOST: Final = "127.0.0.1"

MAX_READERS: Final = 8
"""Requests answered at a time; a connection above that is closed."""

PATIENCE_SECONDS: Final = 5.0
"""How long a connection may send nothing, or leave the answer unread."""

_POLL_SECONDS: Final = 0.1
"""How long ``stop`` waits for the server at most."""

_ADDRESS: Final = re.compile(r"(?:(?:\[([0-9A-Fa-f:.]+)\]|([^][:\s]+)):)?([0-9]{1,5})")


def parse_address(text: str, option: str) -> tuple[str, int]:
    """Return host and port of ``PORT``, ``HOST:PORT`` or ``[IPV6]:PORT``; else UsageError."""
    found = _ADDRESS.fullmatch(text.strip())
    if found is None or int(found[3]) > 65535:
        raise UsageError(f"{option} {text!r} is not PORT, HOST:PORT or [IPV6]:PORT")
    return found[1] or found[2] or DEFAULT_HOST, int(found[3])


def bracketed(host: str) -> str:
    """Return a host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


class HttpServer:
    """Answers requests in threads. The port (0: any free one) is taken at once, or UsageError, and
    answered from ``start`` on."""

    def __init__(
        self, address: tuple[str, int], application: WSGIApplication, option: str, name: str
    ) -> None:
        """``option`` gave the address, and ``name`` is the thread's."""
        host, port = address
        try:
            self._server = make_server(host, port, application, _Server, _RequestHandler)
        except OSError as error:
            raise UsageError(
                f"{option} {bracketed(host)}:{port}: {error.strerror or error}: give another "
                "address, or port 0 for any free port"
            ) from None
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name=name, daemon=True
        )

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port that it listens on."""
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def start(self) -> None:
        """Start to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering and free the port; open connections end with the process."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


class _RequestHandler(WSGIRequestHandler):
    def setup(self) -> None:
        """Set the time limit of the connection."""
        super().setup()
        self.connection.settimeout(PATIENCE_SECONDS)

    def log_message(self, format: str, *args: object) -> None:
        """Log no requests."""


class _Server(ThreadingMixIn, WSGIServer):
    """Limited so that its readers cannot use up the process's files."""

    daemon_threads = True

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
