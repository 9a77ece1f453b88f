"""``elastic-ckpt doctor`` as a whole, its findings on versions, and that it imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

import elastic_ckpt
from elastic_ckpt.cli.doctor import command as doctor_command
from elastic_ckpt.cli.doctor import findings
from elastic_ckpt.cli.doctor import versions as version_findings
from elastic_ckpt.cli.doctor.findings import Finding, StatusLine, ok
from elastic_ckpt.cli.doctor.versions import TESTED
from elastic_ckpt.jobdir.slurm_jobs import SlurmJob, remember_job
from tests.checkpoints import MODEL, make_checkpoint, open_job, tree
from tests.unit.cli.test_app import IN_PROCESS, Command, cli
from tests.unit.test_group_access import GROUP, OTHER_GROUP, as_user, make_job, place

pytestmark = pytest.mark.one_torch

__all__ = ["cli", "place"]

KEYS = {"what", "state", "text", "todo", "value", "unit"}
TESTED_THERE = {
    "directory", "free space", "file system", "fsync", "rename", "O_EXCL", "O_NOFOLLOW", "locks",
    "modes", "file times", "write speed", "emergency save",
}  # fmt: skip

OLD, LATEST = ({**tried, "Python": "3.11.7", "elastic-ckpt": "0.1.0"} for tried in TESTED)


@pytest.fixture
def doctor(cli: Command, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the findings with these versions installed, by ``what``."""

    monkeypatch.setattr(
        doctor_command, "_groups", lambda *given: [("versions", version_findings.check_versions())]
    )

    def ask(versions: dict[str, str], code: int = 0) -> dict[str, Any]:
        monkeypatch.setattr(version_findings, "installed", lambda: versions)
        said = cli("doctor", "--json")
        assert (said.code, said.err) == (code, "")
        return {one["what"]: one for one in said.json}

    return ask


def without(versions: dict[str, str], *names: str) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name not in names}


@pytest.mark.parametrize("versions", [OLD, LATEST], ids=["old", "latest"])
def test_tested_versions_are_ok(doctor: Any, versions: dict[str, str]) -> None:
    found = doctor({**versions, "torch": versions["torch"] + "+cu124"})
    for name, version in versions.items():
        assert found[name]["state"] == "ok" and found[name]["text"].startswith(version)
    assert (found["versions"]["state"], found["versions"]["text"]) == ("ok", "tested together")


@pytest.mark.parametrize("versions", [OLD, LATEST], ids=["old", "latest"])
def test_torch_alone_is_ok(doctor: Any, versions: dict[str, str]) -> None:
    found = doctor(without(versions, "colossalai", "transformers", "peft"))
    assert found["colossalai"]["text"] == "not installed; only needed by scripts that use it"
    names = ("colossalai", "transformers", "peft", "versions")
    assert {found[name]["state"] for name in names} == {"ok"}


def test_another_colossalai_is_a_warning_that_names_the_nearest(doctor: Any, cli: Command) -> None:
    found = doctor({**LATEST, "colossalai": "0.6.0"})
    assert found["colossalai"]["text"] == "0.6.0"
    assert found["versions"]["state"] == "warning"
    assert found["versions"]["text"] == "not tested with the others: colossalai 0.6.0"
    assert found["versions"]["todo"].startswith(
        "install the nearest tested versions (Python 3.11, torch 2.13.0, colossalai 0.5.0, "
        "transformers 4.51.3, peft 0.21.2)"
    )
    said = cli("doctor")  # as people see it, and once
    assert said.code == 0
    assert said.out.count("0.5.0") == 1
    assert "  warning  versions        not tested with the others: colossalai 0.6.0\n" in said.out


def test_another_torch_without_colossalai(doctor: Any) -> None:
    found = doctor(without({**OLD, "torch": "2.6.0"}, "colossalai"))
    assert found["versions"]["text"] == "not tested with the others: torch 2.6.0"
    assert "torch 2.5.1)" in found["versions"]["todo"]
    assert "colossalai" not in found["versions"]["todo"]


@pytest.mark.parametrize("name", ["transformers", "peft"])
def test_a_missing_dependency_of_colossalai_is_a_warning(doctor: Any, name: str) -> None:
    found = doctor(without(OLD, name))
    assert (found[name]["state"], found[name]["text"]) == ("warning", "not installed")
    assert f"pip install {name}=={OLD[name]}" in found[name]["todo"]
    assert found["versions"]["text"] == f"not tested with the others: {name} not installed"


def test_a_missing_torch_is_a_problem(doctor: Any) -> None:
    found = doctor(without(OLD, "torch", "colossalai"), code=1)
    todo = "pip install torch, or name the Python that has it: --python PATH"
    assert (found["torch"]["state"], found["torch"]["todo"]) == ("problem", todo)
    assert "versions" not in found


def test_a_source_tree_reports_its_own_version(doctor: Any) -> None:
    found = doctor(without(OLD, "elastic-ckpt"))
    assert found["elastic-ckpt"]["text"] == f"{elastic_ckpt.__version__}, from source"


def test_versions_come_from_the_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leftovers of a removed package have no version."""
    known: dict[str, str | None] = {"torch": "2.5.1", "colossalai": None}

    def version(name: str) -> str | None:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(metadata, "version", version)
    found = version_findings.installed()
    assert found.pop("Python") == ".".join(map(str, sys.version_info[:3]))
    assert found == {"torch": "2.5.1"}


@pytest.mark.parametrize("options", [["-v"], ["--json"]], ids=["text", "json"])
def test_no_package_is_imported_to_find_its_version(options: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", IN_PROCESS, "doctor", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "torch" in result.stdout
    modules = set(result.stderr.splitlines()[-1].split()[1:])
    assert "elastic_ckpt.cli.doctor.versions" in modules
    assert not modules & {"torch", "colossalai", "transformers", "peft", "numpy", "safetensors"}
    assert not modules & {"elastic_ckpt.training", "elastic_ckpt.supervisor"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write little data."""
    monkeypatch.setattr("elastic_ckpt.cli.doctor.storage.MAX_BYTES", 16 * 2**20)


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.mark.usefixtures("quick")
def test_a_real_run_reports_everything_and_leaves_nothing(cli: Command, tmp_path: Path) -> None:
    before = children()  # multiprocessing's own, of a test in the same process
    said = cli("doctor", tmp_path / "not" / "there", "--json")
    found = {one["what"]: one for one in said.json}
    assert said.err == "" and set(map(frozenset, said.json)) == {frozenset(KEYS)}
    assert len(found) == len(said.json)
    assert found.keys() > TESTED_THERE | {
        "torch",
        "GPUs",
        "/dev/shm",
        "memory",
        "clock",
        "loopback",
    }
    # What the machine is like decides the rest.
    for name in TESTED_THERE - {"directory", "free space", "file system"}:
        assert found[name]["state"] == "ok", found[name]
    assert found["write speed"]["value"] > 0 and found["write speed"]["unit"] == "bytes/s"
    assert str(tmp_path) in found["directory"]["text"]
    assert said.code == int(any(one["state"] == "problem" for one in said.json))
    assert tree(tmp_path) == {} and children() == before


@pytest.mark.usefixtures("quick")
def test_a_job_is_used_for_comparison_and_not_changed(cli: Command, tmp_path: Path) -> None:
    job = open_job(tmp_path / "job")
    make_checkpoint(job, 20)
    before = tree(job.root)
    said = cli("doctor", job.root, "--grace", "0", "--json")
    found = {one["what"]: one for one in said.json}
    assert "epoch-0_step-20" in found["directory"]["text"]
    assert found["emergency save"]["state"] == "problem" and said.code == 1
    assert found["grace"]["value"] == 0
    assert tree(job.root) == before


@pytest.mark.usefixtures("quick")
def test_without_a_directory_no_storage_is_tested(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = {one["what"]: one for one in cli("doctor", "--json").json}
    assert found.keys() & TESTED_THERE == {"directory"}
    assert "give the job directory" in found["directory"]["text"]
    monkeypatch.setenv("ELASTIC_CKPT_DIR", str(tmp_path))
    assert {one["what"] for one in cli("doctor", "--json").json} > TESTED_THERE
    assert tree(tmp_path) == {}


def test_a_slurm_job_number_is_resolved_to_its_directory(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    remember_job("4711", SlurmJob(tmp_path / "job"))
    monkeypatch.setattr(doctor_command, "check_storage", lambda *given: iter(()))
    found = {one["what"]: one for one in cli("doctor", "4711", "--json").json}
    assert found["directory"]["text"].startswith(f"{tmp_path}/job does not exist yet")
    said = cli("doctor", "4712")
    assert (said.code, said.out) == (64, "") and "4712" in said.err


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")
@pytest.mark.parametrize("group", [GROUP, OTHER_GROUP])
def test_another_user_gets_a_problem_for_a_private_directory(place: Path, group: int) -> None:
    job = make_job(place, group_access=True)
    before = tree(job.root)
    said = as_user(job, group, "doctor", "--json")
    found = {one["what"]: one for one in json.loads(said.stdout)}
    assert said.returncode == 1 and said.stderr == "", said
    failed = found["writing" if group == GROUP else "directory"]
    assert failed["state"] == "problem" and failed["text"].endswith("Permission denied")
    assert tree(job.root) == before


def shown(monkeypatch: pytest.MonkeyPatch, capsys: Any, columns: int, *found: Finding) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    for number, one in enumerate(found):
        findings.show("disk", one, begins=number == 0)
    findings.show_summary(found)
    return str(capsys.readouterr().out)


LONG = Finding("fsync", "problem", "word " * 40, "do " * 40 + "/a/path/" + "x" * 90)


def test_lines_fit_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    name = "elastic-ckpt@gpt.service"
    out = shown(
        monkeypatch, capsys, 80, LONG, ok(name, "is as it must be"), ok("x", "a " * 25 + "3.1 GB")
    )
    lines = out.splitlines()
    assert lines[0] == "disk" and lines[-1] == "1 problem; 2 checks ok"
    assert {len(line) for line in lines if "xxx" not in line} <= set(range(81))
    assert f"  ok       {name}\n{'':27}is as it must be\n" in out
    assert f"\n{'':27}-> do do" in out and f"\n{'':30}do do" in out
    assert f"\n{'':27}3.1 GB\n" in out  # an amount is not torn
    assert "x" * 90 in out  # nor a path


def test_colors_only_on_terminals_without_no_color(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert "\x1b" not in shown(monkeypatch, capsys, 80, LONG)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown(monkeypatch, capsys, 80, LONG)
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b[31mproblem" in shown(monkeypatch, capsys, 80, LONG)


def test_control_characters_are_escaped(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    hostile = Finding("/mnt/\x1b[2J", "warning", "a\x1b]0;b\x07\nc", "\x9b1m")
    out = shown(monkeypatch, capsys, 80, hostile)
    assert out.replace("\n", "").isprintable() and "\\x1b]0;b\\x07\\nc" in out


def test_progress_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    StatusLine().say("looking")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    found = list(findings.collect([("disk", iter([ok("a", "b")]))], StatusLine()))
    assert found == [("disk", ok("a", "b"))]
    err = capsys.readouterr().err
    assert "checking disk" in err and err.endswith("\r\x1b[K")


def test_a_path_is_not_accessed_outside_the_child(
    cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead file server blocks every access, so only the bounded child may access the path."""
    parent, real = os.getpid(), os.stat

    def stat(path: Any, *given: Any, **named: Any) -> os.stat_result:
        assert os.getpid() != parent or not str(path).startswith("/dead"), path
        return real(path, *given, **named)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(doctor_command, "check_storage", lambda *given: iter(()))
    said = cli("doctor", "/dead/server/job", "--json")
    assert "/dead/server/job does not exist yet" in said.out


def test_what_is_wrong_comes_first_and_the_rest_is_counted(
    cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def groups(*_given: Any) -> Any:
        return [
            ("versions", iter([ok("torch", "2.13"), ok("Python", "3.11")])),
            ("machine", iter([Finding("clock", "warning", "not synchronised", "run chrony")])),
            ("checkpoints", iter([
                findings.untried("free space", "not reported by the file system"),
                Finding("fsync", "problem", "Input/output error", "use another one"),
            ])),
        ]  # fmt: skip

    monkeypatch.setattr(doctor_command, "_groups", groups)
    said = cli("doctor", "/data/ck")
    assert said.code == 1
    assert [line.split()[:2] for line in said.out.splitlines()] == [
        ["checkpoints"], ["problem", "fsync"], ["->", "use"],
        ["machine"], ["warning", "clock"], ["->", "run"],
        ["1", "problem,"], ["free", "space:"],
    ]  # fmt: skip
    assert (
        "1 problem, 1 warning; 2 checks ok (elastic-ckpt doctor -v /data/ck lists them)\n"
        in said.out
    )
    every = cli("doctor", "-v", "/data/ck").out
    assert every.index("torch") < every.index("clock") < every.index("fsync")
    assert "untried  free space      not reported" in every
    assert every.endswith("1 problem, 1 warning; 2 checks ok\n")
    assert [one["state"] for one in cli("doctor", "--json").json].count("untried") == 1


@pytest.mark.usefixtures("quick")
def test_fix_repairs_what_is_safe_and_nothing_else(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = open_job(tmp_path / "job")
    make_checkpoint(job, 20)
    (make_checkpoint(job, 40) / MODEL).unlink()
    stale, fresh, other = (job.root / f".elastic-ckpt-trial-{name}" for name in
                           ("0" * 16, "1" * 16, "mine"))  # fmt: skip
    for one in (stale, fresh, other):
        one.mkdir()
        (one / "written").write_bytes(b"x")
        os.utime(one, (0, 0) if one is not fresh else None)
    job.checkpoint(9, 9).mkdir()  # another program's
    before = tree(job.root)

    def by_name(*given: Any) -> dict[str, Any]:
        return {one["what"]: one for one in cli("doctor", *given, "--json").json}

    found = by_name(job.root)
    fix = f"elastic-ckpt doctor --fix {job.root}"
    assert found["leftovers"]["text"].startswith(stale.name) and fix in found["leftovers"]["todo"]
    assert found["damaged"]["text"] == f"epoch-0_step-40: {MODEL} is missing"
    assert found["damaged"]["state"] == "warning" and fix in found["damaged"]["todo"]
    assert tree(job.root) == before

    said = cli("doctor", "--fix", job.root)
    assert f"leftovers: fixed: removed {stale.name}\n" in said.out
    assert f"damaged: fixed: epoch-0_step-40: {MODEL} is missing: set aside as" in said.out
    assert not stale.exists() and fresh.exists() and other.exists()
    assert not job.checkpoint(0, 40).exists() and job.checkpoint(0, 20).exists()
    assert job.checkpoint(9, 9).exists() and len(list(job.quarantine.glob("*-40-*.json"))) == 1
    assert not by_name(job.root).keys() & {"leftovers", "damaged"}
    assert cli("doctor", "--fix").code == 64
    assert cli("doctor", "--fix", "s3://bucket/job").code == 64
