"""``nodes``: which nodes are left out, and letting one in."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from elastic_ckpt.cli import nodes
from elastic_ckpt.cli.bucket import status
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.left_out import LeftOutNode, read_left_out, write_left_out
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.checkpoints import open_job


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    job = open_job(tmp_path / "job")
    for name in ("n2", "n3"):
        write_left_out(job, LeftOutNode(name, "its check failed: disk: no", 1e9))
    return job


def run(*arguments: object) -> str:
    done = CliRunner().invoke(nodes.command, list(map(str, arguments)), standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.output


def test_nodes_that_are_left_out_are_shown_with_the_command_to_type(job: JobDirectory) -> None:
    shown = run(job.root)
    assert "n2  left out since 2001-09-" in shown and "its check failed: disk: no" in shown
    assert f"elastic-ckpt nodes {job.root} --let-in n3" in shown


def test_a_node_is_let_in(job: JobDirectory) -> None:
    assert "n2 is let in" in run(job.root, "--let-in", "n2")
    assert [one.node for one in read_left_out(job)] == ["n3"]
    found = msgspec.json.decode(run(job.root, "--json"))
    assert [one["node"] for one in found["left_out"]] == ["n3"]


def test_a_node_that_is_not_left_out_is_an_error_and_nothing_changes(job: JobDirectory) -> None:
    with pytest.raises(UsageError, match="n9 is not left out; left out: n2, n3"):
        run(job.root, "--let-in", "n2", "--let-in", "n9")
    assert len(read_left_out(job)) == 2


def test_a_job_without_nodes_says_so(tmp_path: Path) -> None:
    assert (
        run(open_job(tmp_path / "job").root)
        == "no node is left out, and no run on several nodes is active\n"
    )


def test_a_bucket_has_the_notes_of_nodes_without_a_common_directory(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("obstore")
    from elastic_ckpt.supervisor.cluster.left_out import BucketNotes, notes_in
    from tests.buckets import URL, memory_store

    store = memory_store()
    monkeypatch.setattr(nodes, "open_store", lambda url: store)
    for name in ("n2", "n3"):
        note = LeftOutNode(name, "its workers fail", 1e9, url=str(URL))
        BucketNotes(job, store).write(note)
    assert "n2  left out since" in run(str(URL))
    monkeypatch.setattr(status, "open_store", lambda url: store)
    assert status.status_bucket(URL, as_json=False) == 2  # no checkpoint yet
    shown = "nodes that are left out: n2, n3: elastic-ckpt nodes s3://bucket/job"
    assert shown in capsys.readouterr().out
    assert "n2 is let in" in run(str(URL), "--let-in", "n2")
    assert "n3 is let in" in run(job.root, "--let-in", "n3")  # from the head's own directory
    assert notes_in(store) == []
