"""Who may read the live page: requests by a name of this host, and by its token."""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
import socket
from collections.abc import Mapping
from functools import cache
from http.cookies import CookieError, SimpleCookie
from typing import Final
from urllib.parse import parse_qs

_HOST: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{1,5})?")
_TOKEN_BYTES: Final = 24
_MAX_CHARACTERS: Final = 4096


@cache
def token() -> str:
    """Return this process's token: one for all roles that a node takes."""
    return secrets.token_urlsafe(_TOKEN_BYTES)


def is_loopback(host: str) -> bool:
    """Return whether only processes of this machine reach an address."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


class Guard:
    """Checks requests.

    A page of another site cannot read this one, but it could have its own name resolve to this
    host (rebinding), which makes it the same site to the browser. So a request must name the host
    by an address, ``localhost``, the name that was given, or, where a token is needed, by the name
    of this host in any domain.
    """

    def __init__(self, given: str, bound: str, port: int) -> None:
        """``given`` is the host that the user named, ``bound`` the address that it stands for."""
        self.token = "" if is_loopback(bound) else token()
        self.cookie = f"elastic-ckpt-{port}"
        self._names = {"localhost", given.lower().rstrip(".")}
        self._short = socket.gethostname().partition(".")[0].lower() if self.token else ""

    def knows(self, host: str) -> bool:
        """Return whether the header ``Host`` names this host."""
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = (found[1] or found[2]).lower().rstrip(".")
        try:
            ipaddress.ip_address(name)
        except ValueError:
            is_short = bool(self._short) and name.partition(".")[0] == self._short
            return name in self._names or is_short
        return True

    def brings(self, query: str) -> bool:
        """Return whether a query string has the token: ``token=...``, as in the printed URL."""
        given = parse_qs(query[:_MAX_CHARACTERS]).get("token", [])
        return bool(self.token) and any(map(self._matches, given))

    def lets_in(self, request: Mapping[str, object]) -> bool:
        """Return whether no token is needed, or the request has it in its cookie or header."""
        if not self.token:
            return True
        scheme, _, given = _text(request, "HTTP_AUTHORIZATION").partition(" ")
        if scheme.lower() == "bearer" and self._matches(given.strip()):
            return True
        try:
            found = SimpleCookie(_text(request, "HTTP_COOKIE")).get(self.cookie)
        except CookieError:
            return False
        return found is not None and self._matches(found.value)

    def _matches(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def _text(request: Mapping[str, object], name: str) -> str:
    return str(request.get(name, ""))[:_MAX_CHARACTERS]
