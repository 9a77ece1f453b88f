"""Google Compute Engine: preemption and host maintenance, each by a long poll.

https://cloud.google.com/compute/docs/metadata/getting-live-updates
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from elastic_ckpt.notices import NoticeSource, SourceEvent
from elastic_ckpt.notices.metadata import Response, request
from elastic_ckpt.notices.polling import PollingSource
from elastic_ckpt.policy.deadline import EarlyWarning, Notice

HOST: Final = "169.254.169.254"
PREEMPTED_SECONDS: Final = 30.0
TERMINATED_SECONDS: Final = 60.0
_LONG_POLL_SECONDS: Final = 60


class _GcpSource(PollingSource):
    """A metadata value, by long poll: the service responds once it changes.

    Honours ``GCE_METADATA_HOST``.
    """

    interval_seconds = 1.0
    _value = ""

    def __init__(self) -> None:
        super().__init__()
        self._host = os.environ.get("GCE_METADATA_HOST") or HOST
        self._etag = ""

    def _request(self) -> Response:
        """Return the value: at once the first time, then after a change or after a minute."""
        url = f"http://{self._host}/computeMetadata/v1/instance/{self._value}"
        held_back = 0.0
        if self._etag:
            url += f"?wait_for_change=true&timeout_sec={_LONG_POLL_SECONDS}&last_etag={self._etag}"
            held_back = _LONG_POLL_SECONDS
        etag, self._etag = self._etag, ""  # after a failure, request without waiting
        response = request(url, {"Metadata-Flavor": "Google"}, held_back=held_back)
        new = response.header("etag")
        self._etag = new if new.isalnum() else etag
        return response


class GcpPreempted(_GcpSource):
    """The preemption of a spot VM, half a minute ahead."""

    name = "gcp"
    _value = "preempted"

    def poll(self) -> Iterator[tuple[object, SourceEvent]]:
        response = self._request()
        if response.text == "TRUE":
            yield "preempted", Notice(self.name, "preempted", response.received + PREEMPTED_SECONDS)
        elif response.text != "FALSE":
            raise ValueError(f"preempted is {response.text[:40]!r} instead of TRUE or FALSE")


class GcpMaintenance(_GcpSource):
    """Maintenance of the host: the VM migrates or, if it has GPUs, is terminated."""

    name = "gcp-maintenance"
    _value = "maintenance-event"

    def poll(self) -> Iterator[tuple[object, SourceEvent]]:
        response = self._request()
        if response.text == "TERMINATE_ON_HOST_MAINTENANCE":
            deadline = response.received + TERMINATED_SECONDS
            yield "terminate", Notice(self.name, "terminated for maintenance", deadline)
        elif response.text == "MIGRATE_ON_HOST_MAINTENANCE":
            yield "migrate", EarlyWarning(self.name, "migrates for maintenance")
        elif response.text == "NONE":
            self.forget()  # the next event is a new one
        else:
            raise ValueError(f"maintenance-event is {response.text[:40]!r}")


def gcp_sources() -> list[NoticeSource]:
    """Return both sources."""
    return [GcpPreempted(), GcpMaintenance()]
