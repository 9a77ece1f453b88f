"""What ``elastic-ckpt doctor`` says of the versions, and that it imports nothing to know them."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest

import elastic_ckpt
from elastic_ckpt.cli import version_findings
from elastic_ckpt.core.versions import TRIED
from tests.unit.test_cli import IN_PROCESS, Command, cli

__all__ = ["cli"]

OLD, LATEST = ({**tried, "Python": "3.11.7", "elastic-ckpt": "0.1.0"} for tried in TRIED)


@pytest.fixture
def doctor(cli: Command, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What it finds where these versions are installed, by what it looked at."""

    def ask(versions: dict[str, str], code: int = 0) -> dict[str, Any]:
        monkeypatch.setattr(version_findings, "installed", lambda: versions)
        said = cli("doctor", "--json")
        assert (said.code, said.err) == (code, "")
        return {one["what"]: one for one in said.json}

    return ask


def without(versions: dict[str, str], *names: str) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name not in names}


@pytest.mark.parametrize("versions", [OLD, LATEST], ids=["old", "latest"])
def test_what_was_tried_is_ok(doctor: Any, versions: dict[str, str]) -> None:
    found = doctor({**versions, "torch": versions["torch"] + "+cu124"})
    for name, version in versions.items():
        assert found[name]["state"] == "ok" and found[name]["text"].startswith(version)
    assert (found["versions"]["state"], found["versions"]["text"]) == ("ok", "tried together")


@pytest.mark.parametrize("versions", [OLD, LATEST], ids=["old", "latest"])
def test_torch_alone_is_ok(doctor: Any, versions: dict[str, str]) -> None:
    found = doctor(without(versions, "colossalai", "transformers", "peft"))
    assert found["colossalai"]["text"] == "not installed: scripts without it run"
    names = ("colossalai", "transformers", "peft", "versions")
    assert {found[name]["state"] for name in names} == {"ok"}


def test_another_colossalai_is_a_warning_that_names_the_nearest(doctor: Any, cli: Command) -> None:
    found = doctor({**LATEST, "colossalai": "0.6.0"})
    assert found["colossalai"]["text"] == "0.6.0"
    assert found["versions"]["state"] == "warning"
    assert found["versions"]["text"] == "not tried with the others: colossalai 0.6.0"
    assert found["versions"]["todo"].startswith(
        "the nearest that was tried: Python 3.11, torch 2.13.0, colossalai 0.5.0, "
        "transformers 4.51.3, peft 0.21.2;"
    )
    said = cli("doctor")  # as people see it, and once
    assert said.code == 0
    assert said.out.count("0.5.0") == 1
    assert "warning  versions: not tried with the others: colossalai 0.6.0\n" in said.out


def test_another_torch_alone_names_no_colossalai(doctor: Any) -> None:
    found = doctor(without({**OLD, "torch": "2.6.0"}, "colossalai"))
    assert found["versions"]["text"] == "not tried with the others: torch 2.6.0"
    assert "torch 2.5.1;" in found["versions"]["todo"]
    assert "colossalai" not in found["versions"]["todo"]


@pytest.mark.parametrize("name", ["transformers", "peft"])
def test_what_colossalai_needs_and_lacks_is_a_warning(doctor: Any, name: str) -> None:
    found = doctor(without(OLD, name))
    assert (found[name]["state"], found[name]["text"]) == ("warning", "not installed")
    assert f"pip install {name}=={OLD[name]}" in found[name]["todo"]
    assert found["versions"]["text"] == f"not tried with the others: {name} not installed"


def test_no_torch_is_a_problem(doctor: Any) -> None:
    found = doctor(without(OLD, "torch", "colossalai"), code=1)
    assert (found["torch"]["state"], found["torch"]["todo"]) == ("problem", "pip install torch")
    assert "versions" not in found


def test_a_source_tree_that_is_not_installed_says_its_own_version(doctor: Any) -> None:
    found = doctor(without(OLD, "elastic-ckpt"))
    assert found["elastic-ckpt"]["text"] == f"{elastic_ckpt.__version__}, from its source"


def test_versions_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The remains of a package that was removed have no version."""
    known: dict[str, str | None] = {"torch": "2.5.1", "colossalai": None}

    def version(name: str) -> str | None:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(metadata, "version", version)
    found = version_findings.installed()
    assert found.pop("Python") == ".".join(map(str, sys.version_info[:3]))
    assert found == {"torch": "2.5.1"}


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_nothing_is_imported_to_know_its_version(options: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", IN_PROCESS, "doctor", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "torch" in result.stdout
    modules = set(result.stderr.splitlines()[-1].split()[1:])
    assert "elastic_ckpt.cli.version_findings" in modules
    assert not modules & {"torch", "colossalai", "transformers", "peft", "numpy", "safetensors"}
    assert not modules & {"elastic_ckpt.training", "elastic_ckpt.supervisor"}
