"""What is said of an interpreter that workers cannot run with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_ckpt import __version__
from elastic_ckpt.cli.run import interpreter
from elastic_ckpt.cli.run.command import settings_of
from elastic_ckpt.cli.run.interpreter import (
    ask_python,
    check_python,
    find_python,
    module_file,
    requirement,
)
from elastic_ckpt.errors import UsageError
from elastic_ckpt.util.processes import environment_of
from elastic_ckpt.util.versions import work_together


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    ask_python.cache_clear()


def program(directory: Path, script: str) -> str:
    made = directory / "python"
    made.write_text(f"#!/bin/sh\n{script}\n")
    made.chmod(0o755)
    return str(made)


def that_says(directory: Path, **answer: object) -> str:
    said = {"python": [3, 11, 4], "torch": True, "version": __version__} | answer
    return program(directory, f"echo a site prints this; echo '{json.dumps(said)}'")


def problem(python: str) -> str:
    with pytest.raises(UsageError) as caught:
        check_python(python)
    return str(caught.value)


def test_this_interpreter_is_fine() -> None:
    found = ask_python(sys.executable)
    assert found.python == tuple(sys.version_info[:3]) and found.error == ""
    assert found.version == __version__ and found.torch and "torch" in found.packages
    check_python(sys.executable)
    check_python("")


def test_what_is_missing_is_named_with_the_command(tmp_path: Path) -> None:
    python = str(tmp_path / "python")
    install = f"{python} -m pip install {requirement()}"
    for answer, wanted in (
        ({"version": ""}, f"has no elastic-ckpt: {install}"),
        ({"version": "9.9.9"}, "has elastic-ckpt 9.9.9, which does not work with this one's"),
        ({"error": "ImportError: no msgspec"}, f"elastic-ckpt: ImportError: no msgspec: {install}"),
        ({"torch": False}, f"has no torch: {python} -m pip install torch"),
        ({"python": [3, 9, 2]}, "is Python 3.9.2: elastic-ckpt needs 3.10 or newer"),
    ):
        ask_python.cache_clear()
        assert wanted in problem(that_says(tmp_path, **answer)), answer


class Installed:
    """A distribution with this note of where it came from."""

    def __init__(self, note: str | None) -> None:
        self._note = note

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self._note


def test_the_command_installs_what_is_installed_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "a clone"
    clone.mkdir()
    released = f"elastic-ckpt=={__version__}"
    for note, wanted in (
        (json.dumps({"url": clone.as_uri(), "dir_info": {}}), f"'{clone}'"),
        (json.dumps({"url": (tmp_path / "gone").as_uri()}), released),
        (json.dumps({"url": "https://example.org/clone.git"}), released),
        (None, released),
        ("not JSON", released),
        ("[]", released),
    ):
        monkeypatch.setattr(interpreter, "distribution", lambda _, note=note: Installed(note))
        assert requirement() == wanted


def test_what_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not work as a Python: exit 3: no such" in problem(
        program(tmp_path, "echo no such library >&2; exit 3")
    )
    monkeypatch.setattr(interpreter, "ANSWER_SECONDS", 0.2)
    ask_python.cache_clear()
    assert "did not answer within" in problem(program(tmp_path, "exec sleep 30"))


def test_this_one_without_torch_asks_for_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "find_spec", lambda name: None)
    assert "has no torch: name the job's own Python by --python PATH" in problem("")


def test_path_name_and_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = that_says(tmp_path)
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").symlink_to(real)
    assert find_python(str(venv / "python")) == str(venv / "python")  # the link is the environment
    monkeypatch.setenv("PATH", str(venv))
    assert find_python("python") == str(venv / "python")
    with pytest.raises(UsageError, match=f"is a directory: give {tmp_path / 'venv'}/bin/python"):
        find_python(str(tmp_path / "venv"))
    for missing in ("nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(UsageError, match="no interpreter"):
            find_python(missing)
    (tmp_path / "text").touch(0o644)
    with pytest.raises(UsageError, match="may not execute"):
        find_python(str(tmp_path / "text"))


def test_module_is_the_other_interpreters(tmp_path: Path) -> None:
    assert module_file(sys.executable, "json.tool").name == "tool.py"
    with pytest.raises(UsageError, match="no module nowhere"):
        module_file(sys.executable, "nowhere")


def test_key_of_a_job_file_is_relative_to_it(tmp_path: Path, monkeypatch) -> None:
    made = tmp_path / "venv" / "bin"
    made.mkdir(parents=True)
    that_says(made)
    (tmp_path / "train.py").touch()
    file = tmp_path / "job.toml"
    file.write_text('dir = "ck"\nscript = "train.py"\npython = "venv/bin/python"\n')
    assert settings_of(["--config", str(file)]).python == str(made / "python")
    monkeypatch.setenv("PATH", str(made))
    file.write_text('dir = "ck"\nscript = "train.py"\npython = "python"\n')
    assert settings_of(["--config", str(file)]).python == str(made / "python")
    assert settings_of(["--dir", "ck", str(tmp_path / "train.py")]).python == ""


def test_variables_are_those_of_the_other_environment(tmp_path: Path) -> None:
    bin_ = tmp_path / "venv" / "bin"
    bin_.mkdir(parents=True)
    ours = {"PATH": "/usr/bin", "PYTHONHOME": "/x", "VIRTUAL_ENV": "/y", "A": "1"}
    assert environment_of("", ours) == ours
    assert environment_of(f"{bin_}/python", ours) == {"PATH": f"{bin_}:/usr/bin", "A": "1"}
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    assert environment_of(f"{bin_}/python", {})["VIRTUAL_ENV"] == str(tmp_path / "venv")


def test_versions_that_work_together() -> None:
    assert work_together("0.2.0", "0.2.7") and work_together("1.10.0", "1.10.1rc1")
    assert not work_together("0.2.0", "0.1.0") and not work_together("1.1.0", "1.10.0")
    assert not work_together("", "") and not work_together("unknown", "unknown")
