"""A journal of version one, with each of its events, has the history that version one read from it.

``history.json`` was written by that version's code.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.events import Unknown
from elastic_ckpt.journal.failure_rate import FailureHistory
from elastic_ckpt.journal.history import History
from elastic_ckpt.journal.journal import read_journal
from elastic_ckpt.journal.line import JournalEntry
from tests.checkpoints import open_job

pytestmark = pytest.mark.one_torch

RECORDED = Path(__file__).parents[2] / "fixtures" / "journal-1"
GONE = {"preload-harmful", "preload-refused"}
UNREAD = {
    "runs": {"began", "run_id", "script", "state", "message"}, "incarnations": {"rank"},
    "saves": {"epoch", "step"}, "notices": {"node", "choice"}, "interruptions": {"exit_code"},
    "recoveries": {"incarnation"},
}  # fmt: skip
"""Fields of version one that nothing read."""


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    job = open_job(tmp_path / "job")
    for path in RECORDED.glob("*.jsonl"):
        job.journal(path.stem).write_bytes(path.read_bytes())
    return job


@pytest.fixture
def entries(job: JobDirectory) -> list[JournalEntry]:
    return read_journal(job)


def plain(found: Any) -> Any:
    """Return what JSON holds of a value."""
    if isinstance(found, Enum):
        return found.value
    if dataclasses.is_dataclass(found):
        return {each.name: plain(getattr(found, each.name)) for each in dataclasses.fields(found)}
    if isinstance(found, dict):
        return {str(key): plain(value) for key, value in found.items()}
    return [plain(each) for each in found] if isinstance(found, list | tuple) else found


def part(expected: Any, found: Any) -> Any:
    """Return of ``found`` the fields that version one had."""
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return [part(*pair) for pair in zip(expected, found, strict=True)]
    if isinstance(expected, dict) and isinstance(found, dict):
        return {name: part(value, found.get(name)) for name, value in expected.items()}
    return found


def test_every_line_is_decoded(entries: list[JournalEntry]) -> None:
    assert len({entry.name for entry in entries}) == 41
    unknown = {entry.name for entry in entries if isinstance(entry.event, Unknown)}
    assert unknown == GONE


def test_the_history_is_the_same(entries: list[JournalEntry]) -> None:
    history, failures = History.of(entries), FailureHistory()
    history.close(running=False)
    for entry in entries:
        failures.observe(entry)
    expected = json.loads((RECORDED / "history.json").read_text())
    assert failures.failures == expected.pop("failures")
    assert plain(history.account.spans()) == expected.pop("spans")
    passed = Counter(one["how"] for one in expected.pop("checks") if one["valid"])
    assert passed and history.verified == passed
    for name, unread in UNREAD.items():
        for one in expected[name]:
            for field in unread:
                del one[field]
    for name, value in expected.items():
        assert part(value, plain(getattr(history, name))) == value, name
