"""Where the options of ``run`` end, and which file a script or a module is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import pytest

from elastic_ckpt.cli.run.command import parse, settings_of
from elastic_ckpt.cli.run.entry import words
from elastic_ckpt.errors import UsageError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a script, a package and a namespace package."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    for name in ("pack/__init__.py", "pack/__main__.py", "pack/sub/train.py", "spaces/one/go.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise SystemExit('imported')")
    (tmp_path / "pack/sub/__init__.py").write_text("raise SystemExit('imported')")
    return tmp_path


def started(*arguments: str) -> list[str]:
    """Return what ``run --dir ck ARGUMENTS`` executes."""
    return words(parse(["--dir", "ck", *arguments]))


@pytest.mark.parametrize("separator", [[], ["--"]])
@pytest.mark.parametrize(
    "script",
    [
        ["train.py"],
        ["train.py", "--epochs", "3"],
        ["train.py", "--nproc", "7", "--help", "-m", "x"],
        ["train.py", "data//a", "--", "--x=a//b", "-"],
        ["-m", "pack.sub.train"],
        ["-m", "pack.sub.train", "--epochs", "3", "--nproc", "7", "-m", "y", "--"],
        ["-m", "pack", "data//a"],
    ],
)
def test_options_end_at_the_script_or_the_module(separator: list[str], script: list[str]) -> None:
    assert started("--nproc", "2", *separator, *script) == script
    assert parse(["--dir", "ck", "--nproc", "2", *separator, *script])["nproc"] == "2"


def test_value_of_an_option_does_not_end_the_options() -> None:
    assert started("--name", "-m", "--grace=5", "--group-access", "-m", "pack", "-x") == [
        "-m", "pack", "-x",
    ]  # fmt: skip
    for module in (["--module", "pack"], ["--module=pack"], ["-mpack"]):
        assert started(*module, "--epochs", "3") == ["-m", "pack", "--epochs", "3"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--dir", "ck"], "missing SCRIPT"),
        (["--dir", "ck", "-m"], "-m needs a module"),
        (["--dir", "ck", "--", "-m"], "-m needs a module"),
        (["train.py", "--dir", "ck"], "--dir must stand before the script"),
        (["--nproc", "2", "train.py"], "Missing option '--dir'"),
    ],
)
def test_an_incomplete_line_is_an_error(arguments: list[str], why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(arguments)
    assert why in str(caught.value)


def test_job_file_names_a_module_which_the_command_line_overrides(place: Path) -> None:
    job = place / "job.toml"
    job.write_text('dir = "ck"\nmodule = "pack.sub.train"\nargs = ["--epochs", "3"]\n')
    assert words(parse(["--config", str(job)])) == ["-m", "pack.sub.train", "--epochs", "3"]
    assert words(parse(["--config", str(job), "train.py", "4"])) == ["train.py", "4"]
    assert words(parse(["--config", str(job), "-m", "pack", "4"])) == ["-m", "pack", "4"]
    job.write_text('dir = "ck"\nmodule = "pack"\nscript = "train.py"\n')
    with pytest.raises(UsageError, match="choose one"):
        parse(["--config", str(job)])


@pytest.mark.parametrize(
    ("module", "file"),
    [
        ("train", "train.py"),
        ("pack", "pack/__main__.py"),
        ("pack.sub.train", "pack/sub/train.py"),
        ("spaces.one.go", "spaces/one/go.py"),
    ],
)
def test_a_module_is_found_without_importing_its_packages(
    place: Path, module: str, file: str
) -> None:
    settings = settings_of(["--dir", "ck", "--nproc", "1", "-m", module, "--x"])
    assert settings.script == (place / file).resolve()
    assert (settings.module, settings.args) == (module, ("--x",))
    assert module.partition(".")[0] not in sys.modules


def test_an_installed_module_is_found() -> None:
    settings = settings_of(["--dir", "ck", "--nproc", "1", "-m", "elastic_ckpt"])
    assert settings.script.name == "__main__.py"


@pytest.mark.parametrize(
    "module", ["nowhere", "pack.nowhere", "train.py", "spaces", "pack.sub", "", "a..b", "./train"]
)
def test_a_missing_module_is_an_error(place: Path, module: str) -> None:
    with pytest.raises(UsageError, match=r"no module .* among the installed packages"):
        settings_of(["--dir", "ck", "--nproc", "1", f"--module={module}"])


def test_all_nodes_must_run_the_same_module(place: Path) -> None:
    def terms(*arguments: str) -> Any:
        return settings_of(["--dir", "ck", "--nproc", "1", *arguments]).terms

    assert terms("-m", "train") != terms("-m", "pack.sub.train")


def test_completion_of_an_incomplete_line_does_not_fail() -> None:
    from elastic_ckpt.cli.run.command import command

    command.make_context("run", ["--dir", "ck"], resilient_parsing=True)
    with pytest.raises(click.exceptions.Exit):
        command.make_context("run", ["--help"])
