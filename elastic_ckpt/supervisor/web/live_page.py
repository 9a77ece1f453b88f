"""Serves the report as a live page: one address, read only, no files.

Nothing here runs in the supervisor's loop: requests are answered in threads, and the page is
rendered in another process.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from elastic_ckpt.errors import UsageError
from elastic_ckpt.supervisor.settings import RunSettings
from elastic_ckpt.supervisor.web.guard import Guard
from elastic_ckpt.supervisor.web.renderer import PageRenderer, command_for
from elastic_ckpt.supervisor.web.script import POLICY
from elastic_ckpt.util.http_server import HttpServer, bracketed

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

_HEADERS: Final = (
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", f"{POLICY}; frame-ancestors 'none'"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
)

_METHODS: Final = ("GET", "HEAD")
_PLAIN: Final = "text/plain; charset=utf-8"
_HTML: Final = "text/html; charset=utf-8"

Headers = tuple[tuple[str, str], ...]
Answer = tuple[str, str, bytes, Headers]
"""Status, content type, body, and further headers."""


class LivePage:
    """The live page of one run; does nothing unless the settings ask for it."""

    def __init__(
        self, settings: RunSettings, leads: bool, first: bool, say: Callable[[str], None]
    ) -> None:
        """
        Args:
            leads: this node leads the job; others serve nothing until they do.
            first: this is the process's first role; a later one continues without a page if the
                address is taken.
            say: shows a line to the user alone: the token must not get into a log.

        Raises:
            UsageError: the address cannot be listened on.
        """
        self._server: HttpServer | None = None
        if settings.web is None or not leads:
            return
        self._renderer = PageRenderer(command_for(settings.directory))
        try:
            self._server = HttpServer(settings.web, self._answer, "--web", "live-page")
        except UsageError as error:
            if first:
                raise
            log.warning("no live page: %s", error)
            return
        given, (bound, port) = settings.web[0], self._server.address
        self._guard = Guard(given, bound, port)
        with contextlib.suppress(OSError):  # a terminal that hung up
            say(f"live page: {_url(bound, port, self._guard.token)}")

    def start(self) -> None:
        """Start to answer."""
        if self._server is not None:
            self._server.start()

    def stop(self) -> None:
        """Stop answering, and end what is being rendered."""
        if self._server is not None:
            self._renderer.stop()
            self._server.stop()

    def _answer(self, request: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            status, kind, body, headers = self._find(request)
        except Exception:
            log.exception("cannot answer a request for the live page")
            status, kind, headers = "500 Internal Server Error", _PLAIN, ()
            body = b"it failed: see elastic-ckpt logs --processes\n"
        length = ("Content-Length", str(len(body)))
        start_response(status, [("Content-Type", kind), length, *_HEADERS, *headers])
        return [] if request["REQUEST_METHOD"] == "HEAD" else [body]

    def _find(self, request: WSGIEnvironment) -> Answer:
        guard = self._guard
        if request["REQUEST_METHOD"] not in _METHODS:
            text = "this page can only be read\n"
            return _plain("405 Method Not Allowed", text, ("Allow", ", ".join(_METHODS)))
        if not guard.knows(str(request.get("HTTP_HOST", ""))):
            text = "no page of this name here: name the host as --web does, or by its address\n"
            return _plain("421 Misdirected Request", text)
        if request.get("PATH_INFO") != "/":
            return _plain("404 Not Found", "there is one page: /\n")
        if guard.brings(str(request.get("QUERY_STRING", ""))):  # out of the address bar
            cookie = f"{guard.cookie}={guard.token}; Path=/; HttpOnly; SameSite=Strict"
            return _plain("303 See Other", "", ("Location", "/"), ("Set-Cookie", cookie))
        if not guard.lets_in(request):
            text = "open the address that the run has printed, with its token\n"
            return _plain("403 Forbidden", text)
        page = self._renderer.page()
        if page is None:
            text = "the page cannot be made now: the job directory may not answer\n"
            again = ("Retry-After", "5"), ("Refresh", "5")  # for programs, and for browsers
            return _plain("503 Service Unavailable", text, *again)
        return "200 OK", _HTML, page, ()


def _plain(status: str, text: str, *headers: tuple[str, str]) -> Answer:
    return status, _PLAIN, text.encode(), headers


def _url(bound: str, port: int, token: str) -> str:
    """Return the address to open, on this host's name where it listens on all its addresses."""
    host = socket.gethostname() if ip_address(bound.partition("%")[0]).is_unspecified else bound
    return f"http://{bracketed(host)}:{port}/{f'?token={token}' if token else ''}"
