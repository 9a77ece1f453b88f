"""Amazon EC2: the spot instance's action and the rebalance recommendation, by IMDSv2.

https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Final

import msgspec

from elastic_ckpt.notices import SourceEvent
from elastic_ckpt.notices.metadata import Response, Unanswered, parse_time, request
from elastic_ckpt.notices.polling import PollingSource
from elastic_ckpt.policy.deadline import EarlyWarning, Notice
from elastic_ckpt.util.text import printable

BASE_URL: Final = "http://169.254.169.254"
_TOKEN_SECONDS: Final = 21600
_ACTION: Final = "/latest/meta-data/spot/instance-action"
_REBALANCE: Final = "/latest/meta-data/events/recommendations/rebalance"


class _InstanceAction(msgspec.Struct):
    action: str  # terminate, stop or hibernate: the machine goes away in each case
    time: str


class _Rebalance(msgspec.Struct):
    noticeTime: str


class AwsSource(PollingSource):
    """Usually notified two minutes ahead; honours ``AWS_EC2_METADATA_SERVICE_ENDPOINT``."""

    name = "aws"

    def __init__(self) -> None:
        super().__init__()
        base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or BASE_URL
        self._base = base.rstrip("/")
        self._token = ""
        self._renew_at = 0.0

    def poll(self) -> Iterator[tuple[object, SourceEvent]]:
        found = self._get(_ACTION)
        if found is not None:
            action = msgspec.json.decode(found.text, type=_InstanceAction)
            deadline = found.deadline(parse_time(action.time))
            reason = f"spot instance: {printable(action.action, 40)}"
            yield (action.action, action.time), Notice(self.name, reason, deadline)
        found = self._get(_REBALANCE)
        if found is not None:
            at = msgspec.json.decode(found.text, type=_Rebalance).noticeTime
            yield ("rebalance", at), EarlyWarning(self.name, "rebalance recommendation")

    def _get(self, path: str) -> Response | None:
        """Return the document, or None while it does not exist."""
        for again in (False, True):
            try:
                return self._get_with_token(path)
            except Unanswered as error:
                if error.status == 404:
                    return None
                self._renew_at = 0.0
                if error.status != 401 or again:  # a token may be revoked early
                    raise
        return None

    def _get_with_token(self, path: str) -> Response:
        if time.monotonic() >= self._renew_at:
            headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}
            url = f"{self._base}/latest/api/token"
            try:
                token = request(url, headers, method="PUT", body=b"").text
            except Unanswered as error:  # unlike a document, a token must exist
                raise Unanswered(f"no token: {error}") from None
            if not (token.isascii() and token.isprintable()):
                raise Unanswered(f"{url} returned no token")
            self._token = token
            self._renew_at = time.monotonic() + _TOKEN_SECONDS / 2
        return request(f"{self._base}{path}", {"X-aws-ec2-metadata-token": self._token})
