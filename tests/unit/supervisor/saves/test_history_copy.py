"""What is copied for people once a machine is gone, and what is made of it, hostile or not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import obstore.store
import pytest
from click.testing import CliRunner

from elastic_ckpt.checkpoint.bucket.keys import HISTORY, HistoryKey
from elastic_ckpt.checkpoint.bucket.object_store import BucketStore, open_store
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.app import group
from elastic_ckpt.errors import BucketFailed
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.worker_logs import LogWriter
from elastic_ckpt.journal.events import RunEnded, RunStarted
from elastic_ckpt.journal.journal import Journal, read_journal
from elastic_ckpt.supervisor.saves import history_copy
from elastic_ckpt.supervisor.saves.history_copy import HistoryCopy, contents
from tests.buckets import Hooked, claim, failing, memory_store
from tests.checkpoints import make_checkpoint, open_job

BOUND = 20.0


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    made = open_job(tmp_path / "job")
    journal = Journal(made, "n")
    journal.write(RunStarted(run_id="r", script="x", nproc=2, version="0", slurm_restarts=None))
    for incarnation in (1, 2):
        for rank in (0, 1):
            writer = LogWriter(made, incarnation, rank)
            writer.write(f"rank {rank} of {incarnation}\n".encode())
            writer.close()
    return made


@pytest.fixture
def url(tmp_path: Path) -> BucketUrl:
    return BucketUrl.parse(f"file://{tmp_path}/store")


def some_time() -> Callable[[], float]:
    limit = time.monotonic() + BOUND
    return lambda: limit - time.monotonic()


def copy(job: JobDirectory, store: Bucket, claim: int = 1) -> None:
    made = HistoryCopy(job, store, 0.0)
    made.offer(claim)
    made.close(some_time(), lambda: None)


def keys(store: Bucket) -> list[str]:
    return [one.key for page in store.listing(HISTORY) for one in page]


def ask(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(group, list(words))
    return found.exit_code, found.output + (str(found.exception) if found.exception else "")


def test_the_last_round_has_the_end_and_only_the_newest_incarnation(job: JobDirectory) -> None:
    store = Hooked(memory_store())
    made = HistoryCopy(job, store, 0.0)
    made.offer(3)
    Journal(job, "n").write(RunEnded(state="finished", exit_code=0, message="done"))
    made.close(some_time(), lambda: None)
    assert keys(store) == [
        "history/000003/journal/n.jsonl", "history/000003/logs/000002-00000.log",
        "history/000003/logs/000002-00001.log",
    ]  # fmt: skip
    text = store.get("history/000003/journal/n.jsonl", 10_000)
    assert b'"end"' in text and b'"start"' in text


def test_what_has_not_changed_is_not_sent_again_and_old_logs_go(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_copy, "EVERY_SECONDS", 0.0)
    store = Hooked(memory_store())
    made = HistoryCopy(job, store, 0.0)
    made.offer(1)
    limit = time.monotonic() + BOUND
    while len(keys(store)) < 3:
        assert time.monotonic() < limit
        time.sleep(0.01)
    writer = LogWriter(job, 3, 0)
    writer.write(b"again")
    writer.close()
    store.asked.clear()
    made.close(some_time(), lambda: None)
    assert store.asked.count("put") == 1
    assert [key for key in keys(store) if "logs" in key] == ["history/000001/logs/000003-00000.log"]


def test_sizes_are_bounded_and_a_journal_begins_with_a_whole_line(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_copy, "JOURNAL_BYTES", 1000)
    monkeypatch.setattr(history_copy, "LOG_BYTES", 5)
    journal = Journal(job, "n")
    for number in range(20):
        journal.write(RunEnded(state="finished", exit_code=number, message="x" * 50))
    found = {(kind, name): data for kind, name, data in contents(job)}
    lines = found["journal", "n"].splitlines()
    assert 500 < len(found["journal", "n"]) <= 1000
    assert all(json.loads(line)["event"] == "end" for line in lines)
    assert json.loads(lines[-1])["data"]["exit_code"] == 19
    assert found["logs", "000002-00000"] == b" of 2\n"[-5:]


def test_a_store_that_fails_or_hangs_is_in_nobodys_way(job: JobDirectory) -> None:
    store = Hooked(memory_store())
    store.before = failing("put", HISTORY)
    copy(job, store)
    assert keys(store) == []

    def hang(name: str, key: str) -> None:
        if key.startswith(HISTORY):
            time.sleep(1.0)
            raise BucketFailed("too late")

    store.before = hang
    made = HistoryCopy(job, store, 0.0)
    made.offer(1)
    pings = []
    ticks = iter((1.0, 0.0))
    made.close(lambda: next(ticks), lambda: pings.append(1))
    assert pings == [1]  # one look, and no more


def test_copies_of_owners_long_gone_are_deleted(job: JobDirectory) -> None:
    store = memory_store()
    for number in (1, 10, 11):
        store.put(HistoryKey(number, "journal", "n").key, b"")
    store.put("history/notes", b"of a person")
    copy(job, store, 30)
    assert [key for key in keys(store) if "000030" not in key] == [
        "history/000011/journal/n.jsonl", "history/notes",
    ]  # fmt: skip


def test_logs_of_the_last_owner(job: JobDirectory, url: BucketUrl) -> None:
    store = open_store(url, make=True)
    copy(job, store)
    code, said = ask("logs", str(url))
    assert (code, said.splitlines()[0]) == (0, "== incarnation 2, rank 0 (the end of it)")
    assert "rank 1 of 2" in said and "of 1" not in said
    assert "rank 0 of 2" not in ask("logs", str(url), "--rank", "1")[1]
    assert "no worker output of rank 7" in ask("logs", str(url), "--rank", "7")[1]
    assert "process logs are not copied" in ask("logs", str(url), "--processes")[1]


def test_a_report_joins_the_machines_and_counts_no_line_twice(
    job: JobDirectory, url: BucketUrl, tmp_path: Path
) -> None:
    store = open_store(url, make=True)
    claim(store)
    copy(job, store, 1)
    copy(job, store, 2)  # the same machine again: its lines are there twice
    other = open_job(tmp_path / "other")
    started = RunStarted(run_id="s", script="x", nproc=2, version="0", slurm_restarts=None)
    Journal(other, "n").write(started)
    copy(other, store, 3)
    code, said = ask("report", str(url), "-o", "-")
    assert code == 0, said
    assert "2 runs" in said
    assert f'from <code class="path">{url}</code>' in said
    assert len(read_journal(job)) == 1  # the directory is as it was


def test_what_is_hostile_is_left_out(job: JobDirectory, url: BucketUrl, tmp_path: Path) -> None:
    store = open_store(url, make=True)
    copy(job, store)
    for key, data in {
        "history/000001/journal/..jsonl": b"{}",
        "history/000001/journal/x\u00e9.jsonl": b"{}",
        "history/999999/nodes/n.json": b"[" * 5000,
        "history/999999/journal/m.jsonl": b"\xff\x00\n" + b"[" * 5000 + b"\n",
        "history/000009/journal/big.jsonl": bytes(5 * 1024 * 1024),
        "history/000002/logs/000009-00000.log": b"\x1b]0;title\x07 red \x1b[31m\n",
    }.items():
        store.put(key, data)
    code, said = ask("report", str(url), "-o", "-")
    assert code == 0, said
    assert "1 run," in said
    code, said = ask("logs", str(url))
    assert code == 0 and "\x1b" not in said and "red" in said


@pytest.mark.parametrize(
    "key",
    ["history/000001/journal/../../x.jsonl", "history/1/journal/n.jsonl",
     "history/000001/nodes/.json", "history/000001/logs/x-1.log", "history/000001/nodes/a/b.json"],
)  # fmt: skip
def test_no_other_key_is_taken(key: str) -> None:
    assert HistoryKey.parse(key) is None


def test_a_key_is_its_own(job: JobDirectory) -> None:
    for one in (HistoryKey(7, "journal", "a.b-c"), HistoryKey(7, "logs", "000003-00001")):
        assert HistoryKey.parse(one.key) == one
    assert HistoryKey(7, "nodes", "n\u00f6/de").key == "history/000007/nodes/n__de.json"


def test_an_empty_bucket_has_no_report(url: BucketUrl) -> None:
    open_store(url, make=True)
    code, said = ask("report", str(url), "-o", "-")
    assert code != 0 and "holds no job: correct the URL" in said


def test_checkpoints_without_a_history_are_reported(job: JobDirectory, url: BucketUrl) -> None:
    make_checkpoint(job, 10)
    assert ask("push", str(job.root), str(url))[0] == 0
    code, said = ask("report", str(url), "-o", "-")
    assert code == 0, said
    assert "The newest in the bucket is step 10" in said
    (BucketStore(url, obstore.store.LocalStore(url.prefix))).delete(
        [one.key for page in open_store(url).listing("data/") for one in page][:1]
    )
    assert "is missing" in ask("list", str(url))[1].replace("\n", " ")
