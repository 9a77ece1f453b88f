"""How a run was started: what is kept, and a line that a shell understands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from elastic_ckpt.jobdir.node_record import NodeRecord, ProcessIdentity, read_record
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import RunCommand, command_line, program
from elastic_ckpt.protocol.run_state import RunState

ODD = ["--dir", "a b", "it's", "$HOME", "`id`", "x\ny", "\x1b]0;t\x07", "*", "", "ä", "\\", "&&"]


@pytest.mark.parametrize("shell", ["bash"])
def test_line_can_be_pasted_from_anywhere(tmp_path: Path, shell: str) -> None:
    place = tmp_path / "a dir; with 'odd' $chars\n"
    place.mkdir()
    shows = tmp_path / "show"
    shows.write_text(f"#!{sys.executable}\nimport os, sys, json\n"
                     "print(json.dumps([os.getcwd(), sys.argv[1:]]))\n")  # fmt: skip
    shows.chmod(0o700)
    line = RunCommand((str(shows), "run", *ODD), str(place)).line()
    assert line.isprintable()
    done = subprocess.run([shell, "-c", line], cwd="/", capture_output=True, check=True)
    assert msgspec.json.decode(done.stdout) == [str(place), ["run", *ODD]]


def test_names_of_variables_are_kept_and_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-value")
    found = RunCommand.current(["--dir", "ck", "train.py"])
    assert "WANDB_API_KEY" in found.environment
    assert "a-secret-value" not in repr(found)
    assert found.argv[-4:] == ("run", "--dir", "ck", "train.py")
    assert found.directory == os.getcwd()


def test_command_that_cannot_be_kept_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("x" * 200_000, os.fsdecode(b"\xff")):
        found = RunCommand.current([word])
        assert found.argv == () and found.line() == ""
        msgspec.json.encode(found)


@pytest.mark.parametrize(
    ("words", "options", "moved"),
    [
        ("run --dir a t.py", 3, "run --dir /b t.py"),
        ("run --nproc 2 --dir=a -- t.py --dir x", 4, "run --dir /b --nproc 2 -- t.py --dir x"),
        ("run --config j.toml -- t.py --dir x", 3, "run --dir /b --config j.toml -- t.py --dir x"),
        ("run --dir a t.py", 0, "run --dir /b t.py"),
        ("", 0, ""),
    ],
)
def test_the_same_command_for_a_directory_that_was_moved(
    words: str, options: int, moved: str
) -> None:
    found = RunCommand(tuple(words.split()), "/", options=options, place="/a").at("/b")
    assert (found.argv, found.options == 0) == (tuple(moved.split()), options == 0)
    assert found.script == (found.argv[found.argv.index("t.py") - ("--" in words.split()) :]
                            if options else ())  # fmt: skip


@pytest.mark.parametrize(
    ("called", "words"),
    [("/x/elastic_ckpt/__main__.py", [sys.executable, "-m", "elastic_ckpt"]),
     ("/nowhere/elastic-ckpt", ["/nowhere/elastic-ckpt"])],
)  # fmt: skip
def test_program_is_named_so_that_a_shell_finds_it(monkeypatch, called, words) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert program() == words


def test_program_on_the_path_needs_no_directory(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "elastic-ckpt").write_text("")
    (tmp_path / "elastic-ckpt").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "elastic-ckpt")])
    assert program() == ["elastic-ckpt"]
    assert command_line("list", Path("/a b")) == "elastic-ckpt list '/a b'"


@pytest.mark.parametrize(
    ("names", "managed"), [(["HOME"], False), (["SLURM_JOB_ID"], True), (["INVOCATION_ID"], True)]
)
def test_a_manager_is_recognized_by_its_variables(names: list[str], managed: bool) -> None:
    assert RunCommand((), "/", tuple(names)).is_managed is managed


def test_record_of_an_earlier_version_has_no_command(job: JobDirectory) -> None:
    path = job.node_record("here")
    NodeRecord(
        job="tested", run_id="1", node="here", owner=ProcessIdentity.current(), since=1.0,
        state=RunState.FINISHED, command=RunCommand.current(["x"]),
    ).write(path)  # fmt: skip
    found = read_record(path)
    assert found is not None and found.command == RunCommand.current(["x"])
    data = msgspec.json.decode(path.read_bytes())
    del data["command"]
    path.write_bytes(msgspec.json.encode(data))
    found = read_record(path)
    assert found is not None and found.command is None
