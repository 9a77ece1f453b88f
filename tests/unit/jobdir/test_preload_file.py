"""What the template may import comes from a file that anybody may have written."""

from __future__ import annotations

import json
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.preload_file import (
    MAX_NAME_CHARACTERS,
    MAX_NAMES,
    Preload,
    is_installed,
    is_module_name,
    read_preload,
    write_preload,
)
from elastic_ckpt.training import import_notes
from elastic_ckpt.training.import_notes import ImportNotes
from tests.checkpoints import open_job, tree


@pytest.fixture
def job(tmp_path) -> JobDirectory:
    return open_job(tmp_path / "job")


LARGEST = tuple(f"m{n:0{MAX_NAME_CHARACTERS - 1}}" for n in range(MAX_NAMES))


@pytest.mark.parametrize(
    "preload",
    [
        Preload(),
        Preload(("numpy", "torch._dynamo", "a.b.c")),
        Preload(("numpy",), {"numpy.random": "its import starts a thread"}),
        Preload(("numpy",), {}, "its import starts a thread"),
        Preload(LARGEST, dict.fromkeys(LARGEST, "20 of them are harmful")),
    ],
    ids=["empty", "some", "harmful", "refused", "largest"],
)
def test_the_next_run_reads_what_this_one_wrote(job: JobDirectory, preload: Preload) -> None:
    write_preload(job, preload)
    assert read_preload(job) == preload


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"modules": "os"}', '{"modules": [1]}', '{"modules": [""]}',
        '{"modules": ["good", "a b"]}', '{"modules": ["a..b"]}', '{"modules": [".a"]}',
        '{"modules": ["a/b"]}', '{"modules": ["../a"]}', '{"modules": ["a\\u0000"]}',
        '{"modules": ["m\\u00fcll"]}', '{"modules": ["os"], "harmful": {"a b": "x"}}',
        '{"modules": ["os"], "harmful": ["os"]}', '{"modules": ["os"], "refused": 1}',
        json.dumps({"modules": ["a"] * (MAX_NAMES + 1)}),
        json.dumps({"modules": ["a" * (MAX_NAME_CHARACTERS + 1)]}),
        "[" * 100_000, " " * 1_100_000,
    ],
)  # fmt: skip
def test_a_file_that_is_no_good_is_as_none(job: JobDirectory, text: str) -> None:
    job.preload.write_text(text)
    assert read_preload(job) == Preload()


def test_a_reason_cannot_write_on_a_terminal(job: JobDirectory) -> None:
    job.preload.write_text(json.dumps({"modules": [], "refused": "\x1b[2J" + "x" * 9999}))
    refused = read_preload(job).refused
    assert refused.isprintable()
    assert len(refused) < 300


def test_a_directory_that_was_replaced_by_a_link_is_neither_read_nor_written(
    job: JobDirectory, tmp_path
) -> None:
    write_preload(job, Preload(("numpy",)))
    job.control.rename(tmp_path / "other")
    job.control.symlink_to(tmp_path / "other")
    before = tree(tmp_path / "other")
    assert read_preload(job) == Preload()
    write_preload(job, Preload(("torch",)))
    assert tree(tmp_path / "other") == before


@pytest.mark.parametrize(
    ("path", "installed"),
    [
        ("/usr/lib/python3/dist-packages/yaml/__init__.py", True),
        ("/env/lib/python3.11/site-packages/six.py", True),
        ("/home/me/.venv/lib/site-packages/six.py", True),  # an environment beside the script
        ("/home/me/helper.py", False),
        ("/env/lib/site-packages/mine/helper.py", False),  # the script lies there itself
        ("/env/lib/python3.11/json/__init__.py", False),
        ("/env/site-packages", False),
        ("site-packages/six.py", False),
        ("built-in", False),
        ("", False),
    ],
)
def test_installed_is_what_lies_among_the_packages_and_not_beside_the_script(
    path: str, installed: bool
) -> None:
    assert is_installed(path, ("/work", "/env/lib/site-packages/mine")) is installed


def module(name: str, origin: str | None, spec_name: str = "") -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(spec_name or name, None, origin=origin)
    return made


def test_only_modules_that_were_imported_since_are_noted_in_that_order(
    job: JobDirectory, tmp_path, monkeypatch
) -> None:
    packages = "/env/site-packages"
    old = module("old", f"{packages}/old.py")
    notes = ImportNotes(job, frozenset({"old"}), (str(tmp_path),))
    seen = [
        old, module("z.b", f"{packages}/z/b.py"), module("z", f"{packages}/z/__init__.py"),
        module("alias", f"{packages}/six.py", "six.moves"), module("nowhere", None),
        module("own", str(tmp_path / "own.py")), module("not-a-name", f"{packages}/n.py"),
    ]  # fmt: skip
    modules = {found.__name__: found for found in seen} | {"a": object(), "no_spec": ModuleType("")}
    monkeypatch.setattr(import_notes, "sys", SimpleNamespace(modules=modules))
    notes.write()
    assert read_preload(job) == Preload(("z.b", "z"))


def test_a_refusal_stands_until_other_modules_are_imported(job: JobDirectory, monkeypatch) -> None:
    modules = {"one": module("one", "/site-packages/one.py")}
    monkeypatch.setattr(import_notes, "sys", SimpleNamespace(modules=modules))
    notes = ImportNotes(job, frozenset(), ())
    write_preload(job, Preload(("one",), {}, "its import starts a thread"))
    notes.write()
    assert read_preload(job).refused
    modules["two"] = module("two", "/site-packages/two.py")
    notes.write()
    assert read_preload(job) == Preload(("one", "two"))


def test_names_are_those_that_python_could_import() -> None:
    assert is_module_name("transformers.models.gpt2")
    assert not is_module_name("transformers.models.gpt-2")
