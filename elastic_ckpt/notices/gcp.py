"""Google Compute Engine: preemption and host maintenance, each by a long poll.

https://cloud.google.com/compute/docs/metadata/getting-live-updates
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from elastic_ckpt.notices import SourceEvent
from elastic_ckpt.notices.metadata import Response, request
from elastic_ckpt.notices.polling import PollingSource
from elastic_ckpt.policy.deadline import EarlyWarning, Notice

HOST: Final = "169.254.169.254"
PREEMPTED_SECONDS: Final = 30.0
TERMINATED_SECONDS: Final = 60.0
_LONG_POLL_SECONDS: Final = 60


class _GcpSource(PollingSource):
    """A value that the service holds an answer back for until it changes.

    ``GCE_METADATA_HOST`` is honoured.
    """

    interval_seconds = 1.0
    _value = ""

    def __init__(self) -> None:
        super().__init__()
        self._host = os.environ.get("GCE_METADATA_HOST") or HOST
        self._etag = ""

    def _ask(self) -> Response:
        """The value; at once the first time, then when it has changed or a minute has passed."""
        url = f"http://{self._host}/computeMetadata/v1/instance/{self._value}"
        held_back = 0.0
        if self._etag:
            url += f"?wait_for_change=true&timeout_sec={_LONG_POLL_SECONDS}&last_etag={self._etag}"
            held_back = _LONG_POLL_SECONDS
        etag, self._etag = self._etag, ""  # after a failure ask at once again
        answer = request(url, {"Metadata-Flavor": "Google"}, held_back=held_back)
        new = answer.header("etag")
        self._etag = new if new.isalnum() else etag
        return answer


class GcpPreempted(_GcpSource):
    """A spot or preemptible VM: half a minute."""

    name = "gcp"
    _value = "preempted"

    def ask(self) -> Iterator[tuple[object, SourceEvent]]:
        """TRUE or FALSE."""
        answer = self._ask()
        if answer.text == "TRUE":
            yield "preempted", Notice(self.name, "preempted", answer.heard + PREEMPTED_SECONDS)
        elif answer.text != "FALSE":
            raise ValueError(f"preempted is neither TRUE nor FALSE but {answer.text[:40]!r}")


class GcpMaintenance(_GcpSource):
    """The host is maintained: the VM migrates, or, as one with GPUs, is ended."""

    name = "gcp-maintenance"
    _value = "maintenance-event"

    def ask(self) -> Iterator[tuple[object, SourceEvent]]:
        """NONE, MIGRATE_ON_HOST_MAINTENANCE or TERMINATE_ON_HOST_MAINTENANCE."""
        answer = self._ask()
        if answer.text == "TERMINATE_ON_HOST_MAINTENANCE":
            deadline = answer.heard + TERMINATED_SECONDS
            yield "terminate", Notice(self.name, "terminated for maintenance", deadline)
        elif answer.text == "MIGRATE_ON_HOST_MAINTENANCE":
            yield "migrate", EarlyWarning(self.name, "migrates for maintenance")
        elif answer.text == "NONE":
            self._told.clear()  # the next one is another one
        else:
            raise ValueError(f"maintenance-event is {answer.text[:40]!r}")
