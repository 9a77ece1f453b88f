"""The help of every command: what it does, examples that can be typed, and 80 columns."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import elastic_ckpt.cli.common
from elastic_ckpt.cli.app import SECTIONS, group
from tests.commands import COMMANDS, PROGRAM

each_command = pytest.mark.parametrize("name", list(COMMANDS))


def help_of(name: str, width: int = 80) -> str:
    """As a terminal of this width shows it."""
    command = COMMANDS[name]
    with click.Context(command, info_name=name, terminal_width=width) as context:
        return command.get_help(context)


def examples_of(name: str) -> list[str]:
    """The lines of its help that are commands."""
    lines = [line.strip() for line in (COMMANDS[name].help or "").splitlines()]
    return [line for line in lines if line.startswith(f"{PROGRAM} ")]


def typed(example: str) -> list[str]:
    """Its words behind ``elastic-ckpt``, up to a pipe, another command or a comment."""
    words = shlex.split(example, comments=True)[1:]
    ends = [i for i, word in enumerate(words) if word in ("|", ">", ">>", "&&", "||", "&")]
    return words[: ends[0]] if ends else words


def parse(words: list[str]) -> None:
    """As click would; what is wrong with them is raised."""
    command, name = COMMANDS[PROGRAM], PROGRAM
    while isinstance(command, click.Group):
        name = f"{name} {words[0]}"
        command, words = COMMANDS[name], words[1:]
    command.make_context(name, words)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which the examples' files are there, and their jobs are known."""
    (tmp_path / "train.py").write_text("")
    (tmp_path / "job.toml").write_text('dir = "ckpt"\nscript = "train.py"\n')
    (tmp_path / "hosts").write_text("node0\nnode1\n")
    monkeypatch.setattr(elastic_ckpt.cli.common, "find_job", lambda _: tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@each_command
def test_help_begins_with_what_the_command_does(name: str) -> None:
    """In one sentence, which ``elastic-ckpt --help`` can show on one line."""
    first = COMMANDS[name].get_short_help_str(500)
    assert first[-1] in ".?" and "..." not in first
    assert len(first) <= 64, first


@each_command
def test_help_has_examples_that_can_be_typed(name: str, place: Path) -> None:
    """At least one, and each is of this program, with options and values that there are."""
    examples = examples_of(name)
    assert examples, f"{name} --help shows no example"
    own = name.removeprefix(PROGRAM).split()
    assert any(typed(example)[: len(own)] == own for example in examples)
    for example in examples:
        words = typed(example.replace("$?", "75"))
        try:
            parse(words)
        except click.ClickException as error:
            pytest.fail(f"{example!r}: {error.format_message()}")


@each_command
def test_every_option_says_what_it_does(name: str) -> None:
    """A sentence, and in words of ours what it takes: not ``FLOAT RANGE``."""
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option):
            assert (
                (parameter.help or "")
                .rstrip("]")
                .endswith((".", ",", *"abcdefghijklmnopqrstuvwxyz0123456789)"))
            ), parameter.opts
            assert len(parameter.help or "") > 10, parameter.opts
    assert " RANGE" not in help_of(name)


@each_command
def test_help_fits_a_terminal(name: str) -> None:
    """80 columns, examples included, which are not wrapped."""
    assert [line for line in help_of(name).splitlines() if len(line) > 80] == []


def test_commands_are_grouped_by_purpose() -> None:
    """Each stands once in ``elastic-ckpt --help``, in its section, with its sentence whole."""
    shown = help_of(PROGRAM)
    for title, section in SECTIONS.items():
        part = shown.partition(f"\n{title}:\n")[2].partition("\n\n")[0]
        assert [line.split()[0] for line in part.splitlines()] == list(section)
        assert "..." not in part
    assert set(group.list_commands(click.Context(group))) == {
        name for section in SECTIONS.values() for name in section
    }


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", *words],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.one_torch
def test_a_group_without_a_command_is_a_wrong_call() -> None:
    """One line in a log; the page is for a terminal."""
    done = run("slurm")
    assert done.returncode == 64 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "elastic-ckpt slurm --help" in done.stderr


@pytest.mark.one_torch
@pytest.mark.parametrize(
    ("words", "meant"),
    [(["stauts"], "status"), (["pruned"], "prune"), (["slurm", "sumbit"], "submit"),
     (["list", "--jsno"], "--json"), (["run", "--nprocs", "2"], "--nproc")],
)  # fmt: skip
def test_a_mistyped_word_is_answered_with_the_nearest(words: list[str], meant: str) -> None:
    """Commands, sub-commands and options."""
    done = run(*words)
    assert done.returncode == 64 and len(done.stderr.splitlines()) == 1
    assert "did you mean" in done.stderr.lower() and meant in done.stderr


@pytest.mark.one_torch
def test_a_word_that_is_near_to_nothing_is_answered_with_all_there_are() -> None:
    """So that nobody has to ask once more."""
    done = run("xyzzy")
    assert done.returncode == 64
    assert all(name in done.stderr for section in SECTIONS.values() for name in section)
