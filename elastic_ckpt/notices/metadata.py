"""Requests to a cloud's metadata service: never through a proxy, bounded in time and size."""

from __future__ import annotations

import contextlib
import email.utils
import time
from datetime import datetime, timezone
from typing import Final

TIMEOUT_SECONDS: Final = 3.0
MAX_BYTES: Final = 256 * 1024


class Unanswered(Exception):
    """The request failed; ``status`` is the HTTP status, 0 if there was no response."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Response:
    """Body and headers of a successful response.

    Attributes:
        text: the body.
        received: monotonic seconds.
    """

    def __init__(self, text: str, headers: dict[str, str]) -> None:
        self.text = text
        self.received = time.monotonic()
        self._headers = headers

    def header(self, name: str) -> str:
        """Return a header's value; empty if it is absent."""
        return self._headers.get(name.lower(), "")

    def deadline(self, at: datetime) -> float:
        """Convert the service's wall time ``at`` to this host's monotonic clock, in seconds.

        It uses the service's own clock where the response has a date: this host's may be wrong.
        """
        now = datetime.now(timezone.utc)
        with contextlib.suppress(ValueError):
            now = email.utils.parsedate_to_datetime(self.header("date"))
        return self.received + (at - _aware(now)).total_seconds()


def request(
    url: str,
    headers: dict[str, str],
    *,
    method: str = "GET",
    body: bytes | None = None,
    held_back: float = 0.0,
) -> Response:
    """Send one request.

    Args:
        held_back: seconds for which a long poll may delay the response.

    Raises:
        Unanswered: there is no response in time, or its status is not 200.
    """
    # Imported here because they take half as long as all of elastic-ckpt status.
    import http.client
    import urllib.error
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    timeout = TIMEOUT_SECONDS + held_back
    limit = time.monotonic() + timeout
    question = urllib.request.Request(url, data=body, headers=headers, method=method)
    try:
        with opener.open(question, timeout=timeout) as response:
            parts, size = [], 0
            while part := response.read1(MAX_BYTES):
                parts.append(part)
                size += len(part)
                if size > MAX_BYTES or time.monotonic() > limit:
                    raise Unanswered(f"{url} sent more than {MAX_BYTES} bytes, or too slowly")
            found = {name.lower(): value for name, value in response.headers.items()}
            return Response(b"".join(parts).decode(errors="replace").strip(), found)
    except urllib.error.HTTPError as error:
        error.close()
        raise Unanswered(f"{url} answers {error.code}", error.code) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise Unanswered(f"{url}: {reason or type(error).__name__}") from None


def parse_time(text: str) -> datetime:
    """Parse ``2026-11-25T08:22:00Z``, or a date as in mail and HTTP.

    Raises:
        ValueError: it is neither.
    """
    try:
        return _aware(datetime.fromisoformat(text.strip().replace("Z", "+00:00")))
    except ValueError:
        return _aware(email.utils.parsedate_to_datetime(text))


def _aware(at: datetime) -> datetime:
    return at if at.tzinfo else at.replace(tzinfo=timezone.utc)
