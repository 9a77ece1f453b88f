"""A member finds out whether it shares the head's directory, however long the storage takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.errors import ExitCode
from elastic_ckpt.protocol.messages import HeadLost, Joined
from elastic_ckpt.protocol.run_state import Event, RunState
from elastic_ckpt.supervisor.cluster.member import MemberRole


class Run:
    """A run of a member, whose storage gives ``identities``."""

    def __init__(self) -> None:
        self.now = 100.0
        self.identities: tuple[str, ...] | None = None
        self.waited: list[float] = []
        self.ended: list[Any] = []
        self.said: list[str] = []
        self.followed = "nothing yet"
        self.state = RunState.STARTING
        self.agent = None
        self.settings = SimpleNamespace(
            directory="/job", shared_url="", gather_seconds=60.0, terms={}
        )
        journal = SimpleNamespace(write=lambda event: None)
        self.ports = SimpleNamespace(directory=self, journal=journal)
        self.preemption = SimpleNamespace(patience=lambda seconds: seconds)
        self.record = SimpleNamespace(
            update=lambda **_: None, say=self.said.append, move=lambda *_: None,
            node=SimpleNamespace(head="n1"),
        )  # fmt: skip
        self.incarnation = 0
        self.incarnations = SimpleNamespace(is_watched=False, is_launched=True)
        self.shutdown = self

    @property
    def is_decided(self) -> bool:
        return bool(self.ended)

    def known_identities(self, seconds: float) -> tuple[str, ...] | None:
        self.waited.append(seconds)
        return self.identities

    def follow(self, identity: str) -> None:
        self.followed = identity

    def give_up(self, code: ExitCode, message: str) -> None:
        self.ended.append((code, message))

    def preempt_now(self, event: Event, detail: str, *, stepped: bool) -> None:
        self.ended.append((event, detail))


@pytest.fixture
def run() -> Any:
    return Run()


def join(run: Any) -> MemberRole:
    role = MemberRole("n1:29400")
    role.on_event(run, Joined(head="n1", job="job", run_id="7", identity="f00d", terms={}))
    return role


def test_a_storage_that_answers_late_is_asked_again_without_waiting(run: Any) -> None:
    role = join(run)
    assert run.said == ["joined job, led by n1"]
    for _ in range(3):
        role.look_for_hang(run)
    assert run.followed == ""
    run.identities = ("f00d",)
    role.look_for_hang(run)
    assert run.followed == "f00d"
    assert run.ended == [] and run.waited == [1.0, 0.0, 0.0, 0.0, 0.0]
    role.look_for_hang(run)
    assert len(run.waited) == 5


def test_another_directory_ends_the_run_also_late(run: Any) -> None:
    role = join(run)
    run.identities = ("0dd",)
    role.look_for_hang(run)
    [(code, message)] = run.ended
    assert code is ExitCode.USAGE and "/job is not the job directory of n1" in message


def test_another_bucket_is_named_with_what_to_do(run: Any) -> None:
    run.settings.shared_url = "s3://b/j"
    role = join(run)
    run.identities = ("0dd",)
    role.look_for_hang(run)
    [(code, message)] = run.ended
    assert code is ExitCode.USAGE
    assert message == "s3://b/j is not the bucket of n1: give all nodes the same URL"


def test_a_storage_that_does_not_answer_ends_the_run_with_a_message(run: Any) -> None:
    role = join(run)
    run.now += 61.0
    role.look_for_hang(run)
    assert run.ended == [(Event.ABANDONED, "the storage of /job did not answer for 60 s")]


def test_copy_of_the_directory_ends_the_run_once_the_heads_record_must_have_been_seen(
    run: Any,
) -> None:
    """Two nodes with private copies of one directory: the saves of one miss in the other."""
    run.identities = ("f00d.of-the-copy",)
    role = MemberRole("n1:29400")
    role.on_event(run, Joined(head="n1", job="job", run_id="7", identity="f00d.now", terms={}))
    run.now += 19.0
    role.look_for_hang(run)
    assert run.ended == []
    run.now += 2.0
    role.look_for_hang(run)
    [(code, message)] = run.ended
    assert code is ExitCode.USAGE and "/job is not the job directory of n1" in message


def test_record_that_is_seen_late_is_no_copy(run: Any) -> None:
    run.identities = ("f00d.before",)
    role = MemberRole("n1:29400")
    role.on_event(run, Joined(head="n1", job="job", run_id="7", identity="f00d.now", terms={}))
    run.now += 10.0
    run.identities = ("f00d.now",)
    role.look_for_hang(run)
    run.now += 30.0
    role.look_for_hang(run)
    assert run.ended == []


def test_head_of_an_earlier_run_shares_the_directory(run: Any) -> None:
    """It cannot reach its storage, and so does not know that another run has taken over."""
    run.identities = ("f00d.second", "f00d.first")
    role = MemberRole("n1:29400")
    role.on_event(run, Joined(head="n1", job="job", run_id="7", identity="f00d.first", terms={}))
    run.now += 30.0
    role.look_for_hang(run)
    assert run.ended == []
    assert run.said[0] == "n1 leads a run that another one has taken over"


def test_directory_is_not_compared_with_that_of_a_head_that_is_lost(run: Any) -> None:
    run.identities = ("f00d.second",)
    role = MemberRole("n1:29400")
    role.on_event(run, Joined(head="n1", job="job", run_id="7", identity="f00d.first", terms={}))
    role.on_event(run, HeadLost("no report for 2.6 s"))
    run.now += 21.0
    role.look_for_hang(run)
    assert run.ended == []
