"""What each cloud says, through a service on loopback that says it as the cloud does."""

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


class Ear:
    """Hears a source, which asks very often."""

    def __init__(self, source: NoticeSource) -> None:
        self.source = source
        self.words: list[SourceEvent] = []
        source.interval_seconds = 0.02
        source.start(self.words.append)

    def until(self, condition: Callable[[list[SourceEvent]], object], what: str) -> None:
        limit = time.monotonic() + 20
        while not condition(self.words):
            assert time.monotonic() < limit, f"not within 20 s: {what}; heard {self.words}"
            time.sleep(0.01)

    def one(self) -> SourceEvent:
        self.until(len, "a word")
        return self.words[0]

    def settled(self) -> None:
        self.until(lambda _: self.source.settled, "the first answer")


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[NoticeSource], Ear]]:
    """Makes ears; proxies lead nowhere, and nobody may use one."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(polling, "MAX_BACKOFF_SECONDS", 0.1)
    made: list[Ear] = []

    def make(source: NoticeSource) -> Ear:
        made.append(Ear(source))
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


def seconds_left(word: SourceEvent) -> float:
    assert isinstance(word, Notice)
    return word.deadline - time.monotonic()


# -- AWS ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_aws_action_of_a_spot_instance_is_reported_once(aws: Aws, ear, action: str) -> None:
    heard = ear(AwsSource())
    heard.settled()
    assert heard.words == []
    aws.interrupt(action, 120)
    assert 115 < seconds_left(heard.one()) <= 120
    assert heard.one().reason == f"spot instance: {action}"
    asked = len(aws.requests)
    heard.until(lambda _: len(aws.requests) > asked + 10, "it asks on")
    assert len(heard.words) == 1


def test_aws_action_with_a_new_time_is_reported_again(aws: Aws, ear) -> None:
    aws.interrupt("stop", 120)
    heard = ear(AwsSource())
    heard.one()
    aws.interrupt("stop", 60)
    heard.until(lambda words: len(words) == 2, "the second time")
    assert heard.words[1].deadline < heard.words[0].deadline


def test_aws_rebalance_recommendation_is_a_warning(aws: Aws, ear) -> None:
    aws.recommend()
    assert ear(AwsSource()).one() == EarlyWarning("aws", "rebalance recommendation")


def test_aws_revoked_token_is_renewed(aws: Aws, ear) -> None:
    heard = ear(AwsSource())
    heard.settled()
    aws.token = "two"
    aws.interrupt("terminate", 120)
    heard.one()
    tokens = [path for method, path, _, _ in aws.requests if method == "PUT"]
    assert len(tokens) == 2
    assert all(isinstance(word, Notice) for word in heard.words)


def test_a_notice_is_reported_even_if_the_next_request_fails(aws: Aws, ear) -> None:
    aws.documents["events/recommendations/rebalance"] = "no JSON"
    aws.interrupt("terminate", 120)
    heard = ear(AwsSource())
    assert isinstance(heard.one(), Notice)
    heard.until(lambda words: len(words) == 2, "the trouble")
    assert isinstance(heard.words[1], SourceStatus)


def test_the_oldest_reported_events_are_forgotten_first(aws: Aws, ear, monkeypatch) -> None:
    monkeypatch.setattr(polling, "MAX_REMEMBERED", 2)
    heard = ear(AwsSource())
    for count, seconds in enumerate((120, 110, 100, 90), start=1):
        aws.interrupt("stop", seconds)
        heard.until(lambda words, count=count: len(words) == count, "one more")


def test_the_deadline_uses_the_services_clock(aws: Aws, ear) -> None:
    """This host's is an hour off, as after a machine was resumed from a snapshot."""
    aws.skew = 3600.0
    aws.interrupt("terminate", 120)
    assert 115 < seconds_left(ear(AwsSource()).one()) <= 121


# -- GCP ----------------------------------------------------------------------------------------


def test_gcp_long_poll_returns_on_preemption(gcp: Gcp, ear) -> None:
    heard = ear(GcpPreempted())
    heard.settled()
    heard.until(lambda _: len(gcp.requests) == 2, "the long poll")
    time.sleep(0.2)
    assert len(gcp.requests) == 2 and heard.words == []
    gcp.values["preempted"] = "TRUE"
    assert 25 < seconds_left(heard.one()) <= 30


def test_gcp_preemption_before_the_run_is_reported(gcp: Gcp, ear) -> None:
    gcp.values["preempted"] = "TRUE"
    heard = ear(GcpPreempted())
    heard.settled()
    assert isinstance(heard.words[0], Notice)


def test_gcp_maintenance_migrates_or_terminates_the_machine(gcp: Gcp, ear) -> None:
    heard = ear(GcpMaintenance())
    heard.settled()
    gcp.values["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    assert heard.one() == EarlyWarning("gcp-maintenance", "migrates for maintenance")
    gcp.values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    heard.until(lambda words: len(words) == 2, "the end")
    assert 55 < seconds_left(heard.words[1]) <= 60


# -- Azure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Preempt", "Reboot", "Redeploy", "Terminate"])
def test_azure_event_is_reported_and_approved(azure: Azure, ear, kind: str) -> None:
    heard = ear(AzureSource())
    heard.settled()
    azure.schedule(kind, 30)
    assert 28 < seconds_left(heard.one()) <= 31
    assert heard.one().reason == kind
    heard.source.acknowledge()
    assert azure.events[0]["EventStatus"] == "Started"


def test_azure_freeze_is_a_warning(azure: Azure, ear) -> None:
    azure.schedule("Freeze", 900)
    heard = ear(AzureSource())
    assert heard.one() == EarlyWarning("azure", "Freeze")
    heard.source.acknowledge()
    assert azure.events[0]["EventStatus"] == "Scheduled"


def test_azure_events_of_other_machines_are_ignored(azure: Azure, ear) -> None:
    azure.schedule("Preempt", 30, "vm_1", "vm_2")
    heard = ear(AzureSource())
    heard.settled()
    azure.schedule("Terminate", 60, "vm_1", "vm_0")
    assert heard.one().reason == "Terminate"


def test_azure_event_without_a_valid_time_gets_the_minimum_notice(azure: Azure, ear) -> None:
    azure.schedule("Preempt", 300)
    azure.events[0]["NotBefore"] = "soon"
    assert 25 < seconds_left(ear(AzureSource()).one()) <= 30


def test_azure_event_counts_if_the_machines_name_is_unknown(azure: Azure, ear) -> None:
    azure.machine = ""
    azure.schedule("Preempt", 30, "vm_1")
    assert ear(AzureSource()).one().reason == "Preempt"


# -- all of them misbehave ----------------------------------------------------------------------

SOURCES = [AwsSource, GcpPreempted, GcpMaintenance, AzureSource]


@pytest.mark.parametrize("fault", ["500", "hang", "garbage", "drip", "reset"])
@pytest.mark.parametrize("make", SOURCES)
def test_a_failing_service_causes_one_warning_and_recovers(
    aws: Aws, gcp: Gcp, azure: Azure, ear, monkeypatch, make, fault: str
) -> None:
    monkeypatch.setattr(metadata, "TIMEOUT_SECONDS", 0.3)
    clouds: list[Cloud] = [aws, gcp, azure]
    for cloud in clouds:
        cloud.fault = fault
    heard = ear(make())
    trouble = heard.one()
    assert isinstance(trouble, SourceStatus) and trouble.what.startswith("does not answer: ")
    assert trouble.what.isprintable()
    asked = sum(len(cloud.requests) for cloud in clouds)
    heard.until(lambda _: sum(len(cloud.requests) for cloud in clouds) > asked + 2, "it asks on")
    assert heard.words == [trouble]
    for cloud in clouds:
        cloud.fault = ""
    heard.until(lambda words: len(words) == 2, "it is heard again")
    assert heard.words[1].what == "answers again"


@pytest.mark.parametrize("make", SOURCES)
def test_a_missing_service_does_not_delay_the_start(ear, monkeypatch, make) -> None:
    for name in ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "AZURE_METADATA_SERVICE_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    heard = ear(make())
    heard.settled()
    assert isinstance(heard.one(), SourceStatus)
