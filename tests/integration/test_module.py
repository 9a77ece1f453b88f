"""A module as the training script: what it sees is what it sees under ``python -m``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.job import environment

pytestmark = pytest.mark.one_torch

MODULE = """
import json, sys
from . import helper
seen = [__name__, __package__, __spec__.name, __file__, sys.argv, sys.path[0], helper.NAME]
seen.append(sys.modules["__main__"].__dict__ is globals())
open("seen", "w").write(json.dumps(seen))
"""


@pytest.mark.parametrize("separator", [[], ["--"]])
def test_a_module_runs_as_under_python(tmp_path: Path, separator: list[str]) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    for name, text in (("__init__", ""), ("helper", "NAME = __name__"), ("train", MODULE)):
        (package / f"{name}.py").write_text(text)

    def seen(*command: str) -> list[object]:
        done = subprocess.run(
            [sys.executable, *command, "-m", "pack.train", "--epochs", "3"],
            cwd=tmp_path, env=environment(), timeout=90, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found: list[object] = json.loads((tmp_path / "seen").read_text())
        (tmp_path / "seen").unlink()
        return found

    run = ["-m", "elastic_ckpt", "run", "--dir", "ck", "--nproc", "1", *separator]
    assert seen(*run) == seen()
