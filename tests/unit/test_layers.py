"""Imports point down only, torch stays in two places, and the check of it can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_torch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "elastic_ckpt"

WRONG_TURNS = [
    ("policy/failure.py", "from elastic_ckpt.jobdir import paths", "imports point down only"),
    ("jobdir/paths.py", "import elastic_ckpt.checkpoint", "imports point down only"),
    ("training/functions.py", "import elastic_ckpt.supervisor", "imports point down only"),
    ("cli/status/command.py", "import torch", "torch only in training and in the agent"),
    ("supervisor/listener.py", "import torch", "torch only in training and in the agent"),
    ("training/session.py", "import colossalai", "colossalai only in its engine"),
    ("training/session.py", "import accelerate", "frameworks only in integrations"),
    (
        "supervisor/listener.py",
        "import elastic_ckpt.integrations",
        "frameworks only in integrations",
    ),
    ("policy/restart.py", "import time", "decisions touch no clock, file, process or network"),
    ("protocol/cluster.py", "import os", "decisions touch no clock, file, process or network"),
]


def lint(place: Path) -> subprocess.CompletedProcess[str]:
    """Check the package that lies in ``place``, writing nothing beside it."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's tree and its contracts, to be spoilt."""
    shutil.copytree(
        PACKAGE, tmp_path / "elastic_ckpt", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_import_contracts_hold() -> None:
    """Every contract holds in the tree as it is."""
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 kept, 0 broken" in result.stdout


def test_unchanged_copy_passes(copy: Path) -> None:
    """What the next test sees as red is the wrong import and not the copying."""
    result = lint(copy)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("file", "line", "contract"), WRONG_TURNS, ids=[w[0] for w in WRONG_TURNS])
def test_upward_import_fails(copy: Path, file: str, line: str, contract: str) -> None:
    """The contract that is broken is named, and so is the module that broke it."""
    path = copy / "elastic_ckpt" / file
    path.write_text(path.read_text() + f"\n{line}\n")
    result = lint(copy)
    assert result.returncode != 0
    assert f"{contract} BROKEN" in result.stdout
    assert "elastic_ckpt." + file.removesuffix(".py").replace("/", ".") in result.stdout
