"""Events of each cloud, from a service on loopback that responds as the cloud does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from elastic_ckpt.notices import NoticeSource, SourceEvent, metadata, polling
from elastic_ckpt.notices.aws import AwsSource
from elastic_ckpt.notices.azure import AzureSource
from elastic_ckpt.notices.gcp import GcpMaintenance, GcpPreempted
from elastic_ckpt.policy.deadline import EarlyWarning, Notice, SourceStatus
from tests.clouds import Aws, Azure, Cloud, Gcp


class Receiver:
    """Receives the events of a source that polls very often."""

    def __init__(self, source: NoticeSource) -> None:
        self.source = source
        self.events: list[SourceEvent] = []
        source.interval_seconds = 0.02
        source.start(self.events.append)

    def until(self, condition: Callable[[list[SourceEvent]], object], what: str) -> None:
        limit = time.monotonic() + 20
        while not condition(self.events):
            assert time.monotonic() < limit, f"not within 20 s: {what}; received {self.events}"
            time.sleep(0.01)

    def one(self) -> SourceEvent:
        self.until(len, "an event")
        return self.events[0]

    def settled(self) -> None:
        self.until(lambda _: self.source.settled, "the first answer")


@pytest.fixture
def receive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[NoticeSource], Receiver]]:
    """Makes receivers; the proxy does not work, as no request may use one."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(polling, "MAX_BACKOFF_SECONDS", 0.1)
    made: list[Receiver] = []

    def make(source: NoticeSource) -> Receiver:
        made.append(Receiver(source))
        return made[-1]

    yield make
    for one in made:
        one.source.stop()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Aws]:
    with Aws() as cloud:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"{cloud.url}/")
        yield cloud


@pytest.fixture
def gcp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gcp]:
    with Gcp() as cloud:
        monkeypatch.setenv("GCE_METADATA_HOST", cloud.host)
        yield cloud


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch) -> Iterator[Azure]:
    with Azure() as cloud:
        monkeypatch.setenv("AZURE_METADATA_SERVICE_ENDPOINT", cloud.url)
        yield cloud


def seconds_left(event: SourceEvent) -> float:
    assert isinstance(event, Notice)
    return event.deadline - time.monotonic()


# -- AWS ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_aws_action_of_a_spot_instance_is_reported_once(aws: Aws, receive, action: str) -> None:
    received = receive(AwsSource())
    received.settled()
    assert received.events == []
    aws.interrupt(action, 120)
    assert 115 < seconds_left(received.one()) <= 120
    assert received.one().reason == f"spot instance: {action}"
    before = len(aws.requests)
    received.until(lambda _: len(aws.requests) > before + 10, "further polls")
    assert len(received.events) == 1


def test_aws_action_with_a_new_time_is_reported_again(aws: Aws, receive) -> None:
    aws.interrupt("stop", 120)
    received = receive(AwsSource())
    received.one()
    aws.interrupt("stop", 60)
    received.until(lambda events: len(events) == 2, "the second time")
    assert received.events[1].deadline < received.events[0].deadline


def test_aws_rebalance_recommendation_is_a_warning(aws: Aws, receive) -> None:
    aws.recommend()
    assert receive(AwsSource()).one() == EarlyWarning("aws", "rebalance recommendation")


def test_aws_revoked_token_is_renewed(aws: Aws, receive) -> None:
    received = receive(AwsSource())
    received.settled()
    aws.token = "two"
    aws.interrupt("terminate", 120)
    received.one()
    tokens = [path for method, path, _, _ in aws.requests if method == "PUT"]
    assert len(tokens) == 2
    assert all(isinstance(event, Notice) for event in received.events)


def test_a_notice_is_reported_even_if_the_next_request_fails(aws: Aws, receive) -> None:
    aws.documents["events/recommendations/rebalance"] = "no JSON"
    aws.interrupt("terminate", 120)
    received = receive(AwsSource())
    assert isinstance(received.one(), Notice)
    received.until(lambda events: len(events) == 2, "the trouble")
    assert isinstance(received.events[1], SourceStatus)


def test_the_oldest_reported_events_are_forgotten_first(aws: Aws, receive, monkeypatch) -> None:
    monkeypatch.setattr(polling, "MAX_REMEMBERED", 2)
    received = receive(AwsSource())
    for count, seconds in enumerate((120, 110, 100, 90), start=1):
        aws.interrupt("stop", seconds)
        received.until(lambda events, count=count: len(events) == count, "one more")


def test_the_deadline_uses_the_services_clock(aws: Aws, receive) -> None:
    """This host's is an hour off, as after a machine was resumed from a snapshot."""
    aws.skew = 3600.0
    aws.interrupt("terminate", 120)
    assert 115 < seconds_left(receive(AwsSource()).one()) <= 121


# -- GCP ----------------------------------------------------------------------------------------


def test_gcp_long_poll_returns_on_preemption(gcp: Gcp, receive) -> None:
    received = receive(GcpPreempted())
    received.settled()
    received.until(lambda _: len(gcp.requests) == 2, "the long poll")
    time.sleep(0.2)
    assert len(gcp.requests) == 2 and received.events == []
    gcp.values["preempted"] = "TRUE"
    assert 25 < seconds_left(received.one()) <= 30


def test_gcp_preemption_before_the_run_is_reported(gcp: Gcp, receive) -> None:
    gcp.values["preempted"] = "TRUE"
    received = receive(GcpPreempted())
    received.settled()
    assert isinstance(received.events[0], Notice)


def test_gcp_maintenance_migrates_or_terminates_the_machine(gcp: Gcp, receive) -> None:
    received = receive(GcpMaintenance())
    received.settled()
    gcp.values["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    assert received.one() == EarlyWarning("gcp-maintenance", "migrates for maintenance")
    gcp.values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    received.until(lambda events: len(events) == 2, "the end")
    assert 55 < seconds_left(received.events[1]) <= 60


# -- Azure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Preempt", "Reboot", "Redeploy", "Terminate"])
def test_azure_event_is_reported_and_approved(azure: Azure, receive, kind: str) -> None:
    received = receive(AzureSource())
    received.settled()
    azure.schedule(kind, 30)
    assert 28 < seconds_left(received.one()) <= 31
    assert received.one().reason == kind
    received.source.acknowledge()
    assert azure.events[0]["EventStatus"] == "Started"


def test_azure_freeze_is_a_warning(azure: Azure, receive) -> None:
    azure.schedule("Freeze", 900)
    received = receive(AzureSource())
    assert received.one() == EarlyWarning("azure", "Freeze")
    received.source.acknowledge()
    assert azure.events[0]["EventStatus"] == "Scheduled"


def test_azure_events_of_other_machines_are_ignored(azure: Azure, receive) -> None:
    azure.schedule("Preempt", 30, "vm_1", "vm_2")
    received = receive(AzureSource())
    received.settled()
    azure.schedule("Terminate", 60, "vm_1", "vm_0")
    assert received.one().reason == "Terminate"


def test_azure_event_without_a_valid_time_gets_the_minimum_notice(azure: Azure, receive) -> None:
    azure.schedule("Preempt", 300)
    azure.events[0]["NotBefore"] = "soon"
    assert 25 < seconds_left(receive(AzureSource()).one()) <= 30


def test_azure_event_counts_if_the_machines_name_is_unknown(azure: Azure, receive) -> None:
    azure.machine = ""
    azure.schedule("Preempt", 30, "vm_1")
    assert receive(AzureSource()).one().reason == "Preempt"


# -- all of them misbehave ----------------------------------------------------------------------

SOURCES = [AwsSource, GcpPreempted, GcpMaintenance, AzureSource]


@pytest.mark.parametrize("fault", ["500", "hang", "garbage", "drip", "reset"])
@pytest.mark.parametrize("make", SOURCES)
def test_a_failing_service_causes_one_warning_and_recovers(
    aws: Aws, gcp: Gcp, azure: Azure, receive, monkeypatch, make, fault: str
) -> None:
    monkeypatch.setattr(metadata, "TIMEOUT_SECONDS", 0.3)
    clouds: list[Cloud] = [aws, gcp, azure]
    for cloud in clouds:
        cloud.fault = fault
    received = receive(make())
    trouble = received.one()
    assert isinstance(trouble, SourceStatus) and trouble.what.startswith("does not answer: ")
    assert trouble.what.isprintable()
    before = sum(len(cloud.requests) for cloud in clouds)
    received.until(
        lambda _: sum(len(cloud.requests) for cloud in clouds) > before + 2, "further polls"
    )
    assert received.events == [trouble]
    for cloud in clouds:
        cloud.fault = ""
    received.until(lambda events: len(events) == 2, "it answers again")
    assert received.events[1].what == "answers again"


@pytest.mark.parametrize("make", SOURCES)
def test_a_missing_service_does_not_delay_the_start(receive, monkeypatch, make) -> None:
    for name in ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "AZURE_METADATA_SERVICE_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    received = receive(make())
    received.settled()
    assert isinstance(received.one(), SourceStatus)
