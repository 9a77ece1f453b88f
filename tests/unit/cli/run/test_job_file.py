"""The job file of ``run``: typed keys, precedence, and error messages."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from elastic_ckpt.cli.run import job_file
from elastic_ckpt.cli.run.command import command, settings_of
from elastic_ckpt.cli.run.options import grouped
from elastic_ckpt.errors import UsageError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "job.toml"
    path.write_text(text)
    return str(path)


def printed(*arguments: str, **environment: str) -> dict[str, tuple[str, str]]:
    """Return (value, source) by key, as ``--print-config`` prints them, whatever it says then."""
    found = CliRunner(env=environment).invoke(
        command, [*arguments, "--print-config"], standalone_mode=False
    )
    if found.exception is not None and not found.output:
        raise found.exception
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
    assert {one for one in command.params if isinstance(one, click.Option)} == {
        one for group in grouped(command.params).values() for one in group
    }
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


def test_sizes_are_written_as_on_a_command_line(tmp_path: Path) -> None:
    own = 'dir = "/c"\nscript = "/t.py"\nmirror = "s3://b/j"\n'
    for value in ('"50MB"', "50000000", '"50 mb"'):
        job = write(tmp_path, f'{own}bucket-rate = {value}\nmirror-every = "10m"\n')
        shown = printed("--config", job)
        assert shown["bucket-rate"] == ("50000000.0", "file")
        assert shown["mirror-every"] == ("600.0", "file")
    assert printed("--config", job, "--bucket-rate", "1MiB")["bucket-rate"][0] == "1048576.0"


def test_env_has_variables_for_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.py").write_text("")
    text = 'dir = "c"\nscript = "t.py"\n[env]\nAN_A = "x y"\nAN_B = 3\nAN_C = 0.1\nAN_D = "="\n'
    job = write(tmp_path, text)
    monkeypatch.setenv("AN_A", "another")
    monkeypatch.setenv("AN_B", "3")
    shown = printed("--config", job)
    assert shown["AN_A"] == ('"x y"', "file, in place of the environment's")
    assert shown["AN_B"] == ('"3"', "file")
    assert shown["AN_C"] == ('"0.1"', "file")
    settings = settings_of(["--config", job])
    assert settings.env == {"AN_A": "x y", "AN_B": "3", "AN_C": "0.1", "AN_D": "="}
    assert "x y" not in repr(settings)  # it may be a secret
    again = CliRunner().invoke(command, ["--config", job, "--print-config"], standalone_mode=False)
    assert settings_of(["--config", write(tmp_path, again.output)]).env == settings.env
    job = write(tmp_path, text.partition("[env]")[0])
    assert printed("--config", job)["[env]"] == ("", "default")


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


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('nproc = "eight"', "--config .*job.toml: invalid nproc 'eight'"),
        ('metrics = "x:y:z"', "--config .*job.toml: .*metrics"),
        ('watch = "out/*"\non-notice = "KILL"', "--config .*job.toml: on-notice 'KILL'"),
        ('watch = "out/*"\ncomplete-when = "/x"', "--config .*job.toml: complete-when '/x'"),
        ('script = "absent.py"', "--config .*job.toml: no script .*absent.py: correct its path"),
        ('memory-dir = "off"\nreplicas = 2', "leave one of them out"),
        ('notice-source = ["none", "aws"]', "none excludes aws"),
        ('keep-best = "2"', "--config .*job.toml: keep-best '2'"),
        ('watch = "out/*"\nsave-interval = 50', "save-interval does nothing for checkpoints of"),
        ('watch = "out/*"\nkeep-best = "2:loss"\ndigests = 10', "keep-best, digests do nothing"),
    ],
)
def test_printed_options_that_cannot_run_end_with_the_reason(
    tmp_path: Path, text: str, why: str
) -> None:
    (tmp_path / "t.py").write_text("")
    script = "" if "script" in text else 'script = "t.py"\n'
    job = write(tmp_path, f'dir = "c"\n{script}{text}\n')
    found = CliRunner().invoke(command, ["--config", job, "--print-config"], standalone_mode=False)
    assert 'dir = "' in found.output
    assert isinstance(found.exception, UsageError) and re.search(why, str(found.exception))
    assert not (tmp_path / "c").exists()


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
        ("enf = 3", "unknown key 'enf'; did you mean env?"),
        ("env = 3", "env must be a table of variables"),
        ("[env]\nA = true", '[env] A must be a string or a number: write "1" or "true"'),
        ("[env]\nA = [1]", "[env] A must be a string or a number, not [1]"),
        ("[env]\nA.B = 1", "[env] A must be a string or a number, not {'B': 1}"),
        ('[env]\n"A=B" = 1', "[env] A=B: not a valid name"),
        ('[env]\nA = "\\u0000"', "[env] A: a value cannot contain a NUL byte"),
        ("[env]\nELASTIC_CKPT_DIR = 'x'", "[env] ELASTIC_CKPT_DIR: run sets this variable"),
        ("[env]\nLOCAL_RANK = 0", "[env] LOCAL_RANK: run sets this variable"),
        ("[env]\nMASTER_ADDR = 'x'", "[env] MASTER_ADDR: run sets this variable"),
        ("[env]\nTORCHELASTIC_RUN_ID = 'x'", "[env] TORCHELASTIC_RUN_ID: run sets"),
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


@pytest.mark.parametrize("value", ["-1", '"2 minutes"'])
def test_limits_apply_to_the_file_which_is_named_with_the_key(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, f"grace = {value}\n")
    with pytest.raises(UsageError, match=r"^--config .*job.toml: Invalid value for 'grace': "):
        printed("--config", path, "--dir", "/c", "t.py")
    with pytest.raises(click.BadParameter):
        printed("--config", path, "--dir", "/c", "--grace", "-2", "t.py")
