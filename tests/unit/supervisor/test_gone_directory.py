"""No start repeats saved work where the directory was taken away, whatever the run ends with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.errors import ExitCode
from elastic_ckpt.policy.restart import RestartPolicy
from elastic_ckpt.protocol.run_state import Event
from elastic_ckpt.supervisor.incarnations import Incarnations
from elastic_ckpt.supervisor.ports import NO_CHECKPOINT, Key
from elastic_ckpt.supervisor.saves.mirror_port import NoMirror
from elastic_ckpt.supervisor.shutdown import Shutdown

BEFORE: Key = (0, 60)


class Scene:
    """A run whose directory, with the checkpoint of step 60, may have been taken away."""

    def __init__(self, left_behind: Key | None, now: Key = NO_CHECKPOINT) -> None:
        self.ended: list[tuple[int, str]] = []
        self.launched: list[Any] = []
        directory = SimpleNamespace(
            left_behind=left_behind, lost="", scan_now=lambda left: now, newest=lambda: now
        )
        memory = SimpleNamespace(
            not_on_disk=lambda: None, newest_key=lambda: NO_CHECKPOINT, over=True,
            hurry=lambda: None, serve=lambda: None, owed=lambda: None, kept_by_peer=lambda: None,
        )  # fmt: skip
        own = SimpleNamespace(
            newest_marked=lambda: NO_CHECKPOINT, newest_name="", settled=True, is_finished=False,
            arguments=(), failed="",
        )  # fmt: skip
        board = SimpleNamespace(read_slots=lambda: [SimpleNamespace(saved_step=-1)])
        ports: Any = SimpleNamespace(
            directory=directory, memory=memory, own=own, board=board, mirror=NoMirror()
        )
        record: Any = SimpleNamespace(
            move=lambda event, message, exit_code, **_: self.ended.append((exit_code, message)),
            node=SimpleNamespace(preemptions=0),
        )
        self.shutdown = Shutdown(ports, record, lambda seconds, ends: lambda: seconds)
        self.ports = ports

    def launch(self) -> None:
        run = SimpleNamespace(shutdown=self.shutdown, incarnation=3)
        agent = SimpleNamespace(send=self.launched.append)
        restarts = SimpleNamespace(policy=RestartPolicy(3))
        starter: Any = SimpleNamespace(
            agent=agent, _ports=self.ports, _run=run, begin=lambda number, nodes: None,
            _restarts=restarts,
        )  # fmt: skip
        Incarnations.launch(starter, 1)


@pytest.mark.parametrize("stepped", [True, False])
def test_notice_without_a_save_ends_with_a_code_that_is_not_requeued(stepped: bool) -> None:
    scene = Scene(BEFORE)
    scene.shutdown.preempt_now(Event.STOPPED, "SIGTERM", stepped=stepped)
    [(code, message)] = scene.ended
    assert code == ExitCode.UNAVAILABLE
    assert "the checkpoint of step 60 is not there any more" in message and "SIGTERM" in message


def test_notice_that_was_saved_in_the_new_directory_ends_as_usual() -> None:
    scene = Scene(BEFORE, now=(0, 70))
    scene.shutdown.preempt_now(Event.STOPPED, "SIGTERM")
    assert scene.ended[0][0] == ExitCode.PREEMPTED_SAVED


def test_notice_before_the_first_checkpoint_ends_as_usual() -> None:
    scene = Scene(NO_CHECKPOINT)
    scene.shutdown.preempt_now(Event.STOPPED, "SIGTERM")
    assert scene.ended[0][0] == ExitCode.PREEMPTED_UNSAVED


def test_no_incarnation_is_launched_where_it_would_begin_anew() -> None:
    """As after a regroup, or for another interval."""
    scene = Scene(BEFORE)
    scene.launch()
    assert not scene.launched and scene.ended[0][0] == ExitCode.UNAVAILABLE


@pytest.mark.parametrize(("left_behind", "now"), [(None, NO_CHECKPOINT), (BEFORE, (0, 60))])
def test_incarnation_is_launched_where_nothing_is_missing(left_behind: Any, now: Key) -> None:
    scene = Scene(left_behind, now)
    scene.launch()
    assert len(scene.launched) == 1 and not scene.ended
