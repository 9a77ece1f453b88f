"""With which code a node leaves that does not lead, by where its work is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastic_ckpt.errors import ExitCode
from elastic_ckpt.protocol.run_state import Event
from elastic_ckpt.supervisor.ports import NO_CHECKPOINT, Key
from elastic_ckpt.supervisor.saves.mirror_port import NoMirror
from elastic_ckpt.supervisor.shutdown import Shutdown

SAVED, UNSAVED = ExitCode.PREEMPTED_SAVED, ExitCode.PREEMPTED_UNSAVED
BEFORE, STOP = (0, 1, 40), (0, 1, 50)
"""The checkpoint before the notice, and that of the stop step."""

LEFT = "all ranks left together"


class Leaving:
    """A node under notice, whose ranks have left at step 50."""

    def __init__(self, on_disk: Key | None = BEFORE, owner: str = "job.1") -> None:
        self.ended: list[tuple[int, str]] = []
        self.on_disk = on_disk
        self.owed: Any = None
        self.kept: tuple[Key, str] | None = None
        self.seen: Key | None = None  # by the last scan, if that is older than what is there
        directory = SimpleNamespace(
            left_behind=None, lost="", scan_now=lambda left: self.on_disk,
            newest=lambda: self.seen or self.on_disk or NO_CHECKPOINT, scan=self._scan,
            known_identities=lambda seconds: (owner,),
        )  # fmt: skip
        memory = SimpleNamespace(
            not_on_disk=lambda: None, newest_key=lambda: STOP, over=True, hurry=lambda: None,
            serve=lambda: None, owed=lambda: self.owed, kept_by_peer=lambda: self.kept,
        )  # fmt: skip
        own = SimpleNamespace(
            newest_marked=lambda: NO_CHECKPOINT, newest_name="", settled=True, mark=lambda: None
        )
        ports: Any = SimpleNamespace(
            directory=directory, memory=memory, own=own, mirror=NoMirror(),
            board=SimpleNamespace(read_slots=list),
        )  # fmt: skip
        record: Any = SimpleNamespace(
            move=lambda event, message, exit_code, **_: self.ended.append((exit_code, message)),
            node=SimpleNamespace(preemptions=0),
        )
        self.shutdown = Shutdown(ports, record, lambda seconds, ends: lambda: seconds)
        self.shutdown.follow("job.1")
        self.shutdown.notice_arrived(40)

    def _scan(self) -> None:
        self.seen = None

    def owe(self) -> None:
        """Have what this node has of the stop step's checkpoint wait for the head's drain."""
        slot = "/dev/shm/x/a"
        self.owed = SimpleNamespace(
            age=STOP, seal=SimpleNamespace(step=50), generation=SimpleNamespace(slot=slot)
        )

    def leave(self, *, stopped: bool = True) -> None:
        self.shutdown.preempt(Event.STOPPED, LEFT, stopped=stopped)

    @property
    def end(self) -> tuple[int, str]:
        (found,) = self.ended
        return found


@pytest.mark.parametrize("on_disk", [BEFORE, NO_CHECKPOINT])
@pytest.mark.parametrize("stopped", [True, False])
def test_a_peer_keeps_its_work(on_disk: Key, stopped: bool) -> None:
    node = Leaving(on_disk)
    node.kept = STOP, "h1"
    node.leave(stopped=stopped)
    code, message = node.end
    assert code == SAVED
    assert "step 50 is in the memory of the nodes that stay, what this one had on h1" in message


def test_the_disk_has_it_by_now() -> None:
    node = Leaving(STOP)
    node.kept = STOP, "h1"
    node.leave()
    code, message = node.end
    assert code == SAVED and "newest intact: step 50" in message and "h1" not in message


@pytest.mark.parametrize("on_disk", [BEFORE, None])
@pytest.mark.parametrize("stopped", [True, False])
def test_another_run_owns_the_job_by_now(on_disk: Key | None, stopped: bool) -> None:
    """Which may have gone back to an older checkpoint."""
    node = Leaving(on_disk, owner="job.2")
    node.kept = STOP, "h1"
    node.leave(stopped=stopped)
    code, message = node.end
    assert code == UNSAVED and "which another run may have saved" in message


def test_no_peer_keeps_it_so_the_node_waits_for_the_heads_drain() -> None:
    node = Leaving()
    node.owe()
    node.leave()
    assert not node.ended
    node.on_disk = STOP  # it was not told, but sees it
    node.shutdown.serve()
    assert node.end[0] == SAVED

    node = Leaving()
    node.owe()
    node.leave()
    node.owed, node.on_disk = None, STOP
    node.shutdown.serve()
    assert node.end[0] == SAVED


def test_the_deadline_comes_before_the_heads_drain() -> None:
    node = Leaving()
    node.owe()
    node.leave()
    node.shutdown.preempt_now(Event.EXPIRED, "the deadline came", stopped=True)
    code, message = node.end
    assert code == UNSAVED
    assert message.endswith("step 50 is in memory only, in /dev/shm/x/a")


def test_what_is_older_than_the_disks_is_owed_to_nobody() -> None:
    node = Leaving((0, 1, 60))
    node.owe()
    node.leave()
    assert node.end[0] == SAVED


def test_it_looks_for_what_its_ranks_saved_last() -> None:
    """They saved to the disk as they left; its last scan of that is older."""
    node = Leaving((0, 1, 60))
    node.seen = BEFORE
    node.owe()
    node.leave()
    node.shutdown.serve()
    assert node.end[0] == SAVED


def test_a_run_that_gives_up_waits_for_no_head() -> None:
    """Without a notice nothing would bound it."""
    node = Leaving()
    node.owe()
    node.shutdown.give_up(ExitCode.USAGE, "no")
    assert node.end[0] == ExitCode.USAGE
