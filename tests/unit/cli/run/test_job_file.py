"""The job file of ``run``: typed keys, precedence, and error messages."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from elastic_ckpt.cli.run import job_file
from elastic_ckpt.cli.run.command import command
from elastic_ckpt.errors import UsageError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "job.toml"
    path.write_text(text)
    return str(path)


def printed(*arguments: str, **environment: str) -> dict[str, tuple[str, str]]:
    """Return (value, source) by key, as ``--print-config`` prints them."""
    found = CliRunner(env=environment).invoke(
        command, [*arguments, "--print-config"], standalone_mode=False, catch_exceptions=False
    )
    shown = {}
    for line in found.output.splitlines():
        setting, _, source = line.rpartition("  # ")
        key, equals, value = setting.partition(" = ")
        name = key if equals else key.removeprefix("# ").partition(" ")[0]
        shown[name] = (value.strip(), source)
    return shown


def test_precedence_is_flag_environment_file_default(tmp_path: Path) -> None:
    path = write(tmp_path, 'dir = "a"\nscript = "t.py"\nnproc = 2\ngrace = 5\nkeep-last = 3\n')
    shown = printed("--config", path, "--grace", "60", ELASTIC_CKPT_DIR="/b")
    assert shown["dir"] == ('"/b"', "environment")
    assert shown["grace"] == ("60.0", "flag")
    assert shown["nproc"] == ('"2"', "file")
    assert shown["keep-last"] == ("3", "file")
    assert shown["max-failures"] == ("3", "default")
    assert shown["mtbf"] == ("", "default")


def test_every_option_of_run_has_a_key() -> None:
    keys = job_file.option_keys(command)
    flags = {opt[2:] for one in command.params for opt in one.opts if opt.startswith("--")}
    assert set(keys) == flags - {"config", "print-config"} | {"script", "args"}


def test_keys_for_the_batch_script_are_shown_and_change_nothing(tmp_path: Path) -> None:
    start = 'dir = "a"\nscript = "t.py"\n'
    more = 'setup = "cd x\\nls"\nsrun = ["--a=b c"]\nsupervisor-python = " p q "\n'
    path = write(tmp_path, start + more)
    shown = printed("--config", path)
    assert shown["setup"] == ('"cd x\\nls"', "file, for slurm submit")
    assert shown["srun"] == ('["--a=b c"]', "file, for slurm submit")
    keys = job_file.read_batch_keys(Path(path))
    assert keys == job_file.BatchKeys(("cd x", "ls"), ("--a=b c",), "p q")
    assert job_file.read_batch_keys(Path(write(tmp_path, start))) == job_file.BatchKeys()


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir("/")
    path = write(tmp_path, 'dir = "c"\nscript = "../t.py"\nargs = ["a b", "--x"]\n')
    shown = printed("--config", path)
    assert shown["dir"] == (f'"{tmp_path}/c"', "file")
    assert shown["script"] == (f'"{tmp_path}/../t.py"', "file")
    assert shown["args"] == ('["a b", "--x"]', "file")
    off = write(tmp_path, 'dir = "/c"\nscript = "/t.py"\nmemory-dir = "off"\n')
    assert printed("--config", off)["memory-dir"] == ('"off"', "file")
    told = write(
        tmp_path, 'dir = "/c"\nscript = "/t.py"\nmetrics-file = "m/a.prom"\nmetrics = 94\n'
    )
    shown = printed("--config", told)
    assert shown["metrics-file"] == (f'"{tmp_path}/m/a.prom"', "file")
    assert shown["metrics"][1] == "file"


def test_durations_and_arguments_are_written_as_on_a_command_line(tmp_path: Path) -> None:
    job = write(
        tmp_path,
        'dir = "/c"\nscript = "/t.py"\nargs = ["--epochs", 3, "--lr", 0.1]\n'
        'grace = "2m"\nrdzv-timeout = 90\nhang-seconds = "1h30m"\n',
    )
    shown = printed("--config", job)
    assert shown["args"] == ('["--epochs", "3", "--lr", "0.1"]', "file")
    assert [shown[one][0] for one in ("grace", "rdzv-timeout", "hang-seconds")] == [
        "120.0", "90.0", "5400.0",
    ]  # fmt: skip
    assert printed("--config", job, "--grace", "45s")["grace"] == ("45.0", "flag")


def test_the_printed_options_are_an_equivalent_job_file(tmp_path: Path) -> None:
    first = write(tmp_path, 'dir = "/c"\nscript = "/t.py"\nargs = ["\\"q\\""]\nnnodes = "1:2"\n')
    runner = CliRunner()
    arguments = ["--config", first, "--group-access", "--print-config"]
    text = runner.invoke(command, arguments, standalone_mode=False).output
    again = write(tmp_path, text)
    shown = printed("--config", again)
    assert shown["args"] == ('["\\"q\\""]', "file")
    assert shown["group-access"] == ("true", "file")
    assert shown["nnodes"] == ('"1:2"', "file")


@pytest.mark.parametrize("value", ['"--from \\"{newest}\\""', '["--from", "{newest}"]'])
def test_resume_args_are_words_in_a_list_and_a_command_line_in_a_string(
    tmp_path: Path, value: str
) -> None:
    job = write(tmp_path, f'dir = "/c"\nscript = "/t.py"\nwatch = "a"\nresume-args = {value}\n')
    assert printed("--config", job)["resume-args"] == ('["--from", "{newest}"]', "file")
    shown = printed("--config", job, "--resume-args", "--from '{newest}'")["resume-args"]
    assert shown == ('["--from", "{newest}"]', "flag")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nprocs = 2", "unknown key 'nprocs'; did you mean nproc?"),
        ("save_interval = 3", "unknown key 'save_interval'; did you mean save-interval?"),
        ("zzzzzz = 1", "unknown key 'zzzzzz'; the keys are dir, "),
        ("config = 'x'", "unknown key 'config'"),
        ("grace = true", "grace must be a number of seconds, or a duration like 90s or 2m"),
        ("keep-last = 1.5", "keep-last must be an integer, not 1.5"),
        ("keep-last = true", "keep-last must be an integer, not True"),
        ("group-access = 1", "group-access must be true or false, not 1"),
        ("args = 'x'", "args must be a list of strings and numbers, not 'x'"),
        ("args = [true]", "args must be a list of strings and numbers, not [True]"),
        ("dir = 3", "dir must be a path, not 3"),
        ("nproc = [2]", "nproc must be a string or an integer, not [2]"),
        ("[run]\nnproc = 2", "unknown key 'run'"),
        ("nproc = ", "is not valid TOML"),
        ("nproc = 1\nnproc = 2", "is not valid TOML"),
    ],
)
def test_an_invalid_file_is_reported(tmp_path: Path, text: str, why: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        printed("--config", path, "--dir", "/c", "t.py")
    assert f"--config {path}" in str(caught.value)
    assert why in str(caught.value)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml: No such file"):
        printed("--config", str(tmp_path / "nowhere.toml"), "--dir", "/c", "t.py")


def test_limits_apply_to_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "grace = -1\n")
    with pytest.raises(click.BadParameter):
        printed("--config", path, "--dir", "/c", "t.py")
