"""Azure: Scheduled Events.

https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final

import msgspec

from elastic_ckpt.notices import SourceEvent
from elastic_ckpt.notices.metadata import Response, Unanswered, parse_time, request
from elastic_ckpt.notices.polling import PollingSource
from elastic_ckpt.policy.deadline import EarlyWarning, Notice
from elastic_ckpt.util.text import printable

BASE_URL: Final = "http://169.254.169.254"
LEAST_SECONDS: Final = 30.0
"""The minimum notice of a preemption; for an event that has started, which has no time."""

_GOES: Final = frozenset({"Preempt", "Reboot", "Redeploy", "Terminate"})
_HEADERS: Final = {"Metadata": "true"}


class _ScheduledEvent(msgspec.Struct, rename="pascal"):
    event_id: str
    event_type: str
    not_before: str = ""
    resources: list[str] = msgspec.field(default_factory=list)


class _Document(msgspec.Struct, rename="pascal"):
    events: list[_ScheduledEvent]


class AzureSource(PollingSource):
    """Events of this machine; honours ``AZURE_METADATA_SERVICE_ENDPOINT``."""

    name = "azure"

    def __init__(self) -> None:
        super().__init__()
        base = os.environ.get("AZURE_METADATA_SERVICE_ENDPOINT") or BASE_URL
        self._url = f"{base.rstrip('/')}/metadata/scheduledevents?api-version=2020-07-01"
        self._name_url = (
            f"{base.rstrip('/')}/metadata/instance/compute/name?api-version=2021-02-01&format=text"
        )
        self._machine = ""
        self._approvable: list[str] = []

    def poll(self) -> Iterator[tuple[object, SourceEvent]]:
        response = request(self._url, _HEADERS)
        events = msgspec.json.decode(response.text, type=_Document).events
        mine = [event for event in events if self._is_mine(event)]
        self._approvable = [event.event_id for event in mine if event.event_type in _GOES]
        for event in mine:
            what = printable(event.event_type, 40)
            if event.event_type in _GOES:
                deadline = _deadline(response, event)
                yield (event.event_id, event.not_before), Notice(self.name, what, deadline)
            else:
                yield event.event_id, EarlyWarning(self.name, what)

    def acknowledge(self) -> None:
        """Approve the events; otherwise the service waits until their scheduled time."""
        if not self._approvable:
            return
        starts = [{"EventId": event} for event in self._approvable]
        body = msgspec.json.encode({"StartRequests": starts})
        with contextlib.suppress(Unanswered):
            request(self._url, _HEADERS, method="POST", body=body)

    def _is_mine(self, event: _ScheduledEvent) -> bool:
        """Return whether an event affects this machine of a scale set; True if unknown."""
        if not self._machine:
            with contextlib.suppress(Unanswered):
                self._machine = request(self._name_url, _HEADERS).text
        return not self._machine or not event.resources or self._machine in event.resources


def _deadline(response: Response, event: _ScheduledEvent) -> float:
    try:
        return response.deadline(parse_time(event.not_before))
    except ValueError:  # it has started, so it has no time
        return response.received + LEAST_SECONDS
