"""A name means one thing: no class or module of the package is called like another one."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "elastic_ckpt"


def test_each_class_name_means_one_thing() -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(str(path.relative_to(PACKAGE)))
    for name in ("ElasticCallback", "Session"):  # the same thing, for each framework's own loop
        places = set(found.pop(name)) - {"training/session.py"}
        assert all(path.startswith("integrations/") for path in places)
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_folders_are_subjects_and_files_are_short() -> None:
    folders: dict[Path, int] = defaultdict(int)
    for path in PACKAGE.rglob("*.py"):
        folders[path.parent] += path.name != "__init__.py"
        assert len(path.read_text().splitlines()) <= 400, path
    assert {str(folder): count for folder, count in folders.items() if count > 15} == {}
