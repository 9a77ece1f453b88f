"""What status, list and the report show of checkpoints that the script writes itself."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from elastic_ckpt.cli.listing import command as list_command
from elastic_ckpt.cli.report.figures import figures
from elastic_ckpt.cli.report.material import collect
from elastic_ckpt.cli.report.page import render
from elastic_ckpt.cli.status.view import StatusView, gather
from elastic_ckpt.jobdir.node_record import NodeRecord, ProcessIdentity
from elastic_ckpt.journal.events import RunStarted, WorkersLaunched
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.policy.own_saves import OwnSaves, parse_complete_when
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.supervisor.saves.own_watch import OwnWatch
from tests.unit.checkpoint.test_own_keeper import Place, never
from tests.waiting import until

pytestmark = pytest.mark.one_torch


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A job whose script has saved steps 10 and 20, which are sealed."""
    found = Place(tmp_path)
    for step in (10, 20):
        found.save(step)
        found.keeper().prepare(never)
    return found


def shown(place: Place, state: RunState) -> StatusView:
    NodeRecord(
        job="j", run_id="1", node="here", since=time.time(), state=state, incarnation=1,
        owner=ProcessIdentity.current(), saves_itself=True,
    ).write(place.job.node_record("here"))  # fmt: skip
    return gather(place.job)


@pytest.mark.parametrize(
    ("state", "then"),
    [
        (RunState.RUNNING, "a restart resumes from checkpoint-10"),
        (RunState.PREEMPTED, "a restart resumes from checkpoint-10"),
        (RunState.FINISHED, "the newest intact is checkpoint-10"),
    ],
)
@pytest.mark.parametrize("is_set_aside", [False, True])
def test_damage_of_the_newest_sealed_one_is_named(
    place: Place, state: RunState, then: str, is_set_aside: bool
) -> None:
    (place.base / "out/checkpoint-20/model.pt").write_bytes(b"truncated")
    if is_set_aside:
        place.keeper().prepare(never)
    found = [one.text for one in shown(place, state).problems]
    if is_set_aside and state is RunState.FINISHED:
        assert found == []  # it reached its end without it
        return
    (text,) = found
    assert text.startswith("checkpoint-20 is damaged (") and text.endswith(then)


@pytest.mark.parametrize("what", ["deleted by the script", "torn by a kill", "older"])
def test_what_is_no_damage_is_not_named(place: Place, what: str) -> None:
    if what == "older":
        (place.base / "out/checkpoint-10/model.pt").write_bytes(b"truncated")
    elif what == "torn by a kill":
        place.save(30, whole=False)
        place.keeper().prepare(never)
        assert place.aside
    else:
        for path in (place.base / "out/checkpoint-20").iterdir():
            path.unlink()
        (place.base / "out/checkpoint-20").rmdir()
    assert shown(place, RunState.PREEMPTED).problems == []


def test_a_first_save_that_was_torn_is_no_reason_not_to_start(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.save(10, whole=False)
    place.keeper().prepare(never)  # it is new: taken over or set aside
    place.save(20, whole=False)
    place.keeper().prepare(never)
    view = shown(place, RunState.PREEMPTED)
    assert view.newest_intact is None and not view.is_stuck
    assert "starts at step 0" in view.advice


def test_list_names_what_is_in_quarantine(place: Place) -> None:
    place.save(30, whole=False)
    place.keeper().prepare(never)
    text = CliRunner().invoke(list_command, [str(place.job.root)]).output
    assert "checkpoint-30: it was not sealed" in " ".join(text.split())
    found = json.loads(CliRunner().invoke(list_command, [str(place.job.root), "--json"]).output)
    assert [(one["step"], one["tier"]) for one in found] == [
        (20, "disk"), (10, "disk"), (30, "quarantine"),
    ]  # fmt: skip


def test_the_report_lists_them_and_from_which_the_script_resumes(place: Place) -> None:
    rules = OwnSaves(
        (str(place.base / "out/checkpoint-*"),), parse_complete_when("state.json"),
        resume_args=("--resume", "{newest}"),
    )  # fmt: skip
    journal = Journal(place.job, "here")
    journal.write(RunStarted(run_id="2", script="train.py", nproc=1, version="1"))
    journal.write(WorkersLaunched(incarnation=1, nproc=1, nodes=1))
    watch = OwnWatch(place.job, rules, 2, Retention(), journal, lambda _: None, lambda: None)
    watch.start()
    try:
        watch.prepare(never)
        until(lambda: watch.prepared)
        watch.launched(1)
    finally:
        watch.close(5)
    material = collect(place.job)
    assert [one.from_step for one in material.history.incarnations] == [20]
    (row,) = figures(material).tiers
    assert (row.tier, row.place, row.newest, row.count) == (
        "own", "disk, written by the script", 20, 2,
    )  # fmt: skip
    page = render(material)
    assert ">checkpoint-20<" in page and "step 20, own" in page
