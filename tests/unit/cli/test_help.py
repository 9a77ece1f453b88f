"""The help of every command: its purpose, working examples, and 80 columns."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import elastic_ckpt.cli.common
from elastic_ckpt.cli.app import SECTIONS, group
from elastic_ckpt.jobdir.slurm_jobs import SlurmJob
from tests.commands import COMMANDS, PROGRAM

each_command = pytest.mark.parametrize("name", list(COMMANDS))


def help_of(name: str, width: int = 80) -> str:
    """Return the help as a terminal of this width shows it."""
    command = COMMANDS[name]
    with click.Context(command, info_name=name, terminal_width=width) as context:
        return command.get_help(context)


def examples_of(name: str) -> list[str]:
    """Return the example commands in a help text."""
    lines = [line.strip() for line in (COMMANDS[name].help or "").splitlines()]
    return [line for line in lines if line.startswith(f"{PROGRAM} ")]


def typed(example: str) -> list[str]:
    """Return the words after ``elastic-ckpt``, up to a pipe, another command or a comment."""
    words = shlex.split(example, comments=True)[1:]
    ends = [i for i, word in enumerate(words) if word in ("|", ">", ">>", "&&", "||", "&")]
    return words[: ends[0]] if ends else words


def parse(words: list[str]) -> None:
    """Parse words as click would, and raise its errors."""
    command, name = COMMANDS[PROGRAM], PROGRAM
    while isinstance(command, click.Group):
        name = f"{name} {words[0]}"
        command, words = COMMANDS[name], words[1:]
    command.make_context(name, words)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files and jobs of the examples."""
    (tmp_path / "train.py").write_text("")
    (tmp_path / "job.toml").write_text('dir = "ckpt"\nscript = "train.py"\n')
    (tmp_path / "hosts").write_text("node0\nnode1\n")
    monkeypatch.setattr(elastic_ckpt.cli.common, "find_job", lambda _: SlurmJob(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@each_command
def test_help_starts_with_the_purpose(name: str) -> None:
    """In one sentence that fits a line of ``elastic-ckpt --help``."""
    first = COMMANDS[name].get_short_help_str(500)
    assert first[-1] in ".?" and "..." not in first
    assert len(first) <= 64, first


@each_command
def test_help_has_working_examples(name: str, place: Path) -> None:
    """At least one, and each with existing options and values."""
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
def test_every_option_has_a_description(name: str) -> None:
    """A sentence, and a metavar of our own instead of ``FLOAT RANGE``."""
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
    """80 columns, including the examples, which are not wrapped."""
    assert [line for line in help_of(name).splitlines() if len(line) > 80] == []


def test_commands_are_grouped_by_purpose() -> None:
    """Each appears once in ``elastic-ckpt --help``, in its section, with its whole sentence."""
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
def test_a_group_without_a_command_is_64() -> None:
    """One line in a log; the help is for terminals."""
    done = run("slurm")
    assert done.returncode == 64 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "elastic-ckpt slurm --help" in done.stderr


@pytest.mark.one_torch
@pytest.mark.parametrize(
    ("words", "meant"),
    [(["stauts"], "status"), (["pruned"], "prune"), (["slurm", "sumbit"], "submit"),
     (["list", "--jsno"], "--json"), (["run", "--nprocs", "2"], "--nproc")],
)  # fmt: skip
def test_a_typo_gets_the_nearest_match(words: list[str], meant: str) -> None:
    """For commands, subcommands and options."""
    done = run(*words)
    assert done.returncode == 64 and len(done.stderr.splitlines()) == (
        3 if words[0] == "run" else 1
    )
    assert "did you mean" in done.stderr.lower() and meant in done.stderr


@pytest.mark.one_torch
def test_an_unknown_command_gets_the_list_of_commands() -> None:
    done = run("xyzzy")
    assert done.returncode == 64
    assert all(name in done.stderr for section in SECTIONS.values() for name in section)
