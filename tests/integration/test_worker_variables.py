"""The job file's variables: workers have them from their interpreter's start, ``run`` does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreters import make_environment
from tests.job import environment

pytestmark = pytest.mark.one_torch

SCRIPT = """
import json, os, here
names = ("OF_FILE", "OF_BOTH", "OMP_NUM_THREADS", "PYTHONWARNINGS", "RANK")
seen = {name: os.environ.get(name) for name in names}
if os.environ["RANK"] == "0":
    open("seen", "w").write(json.dumps(seen))
"""

JOB = """
dir = "ck"
script = "train.py"
nproc = 2

[env]
OF_FILE = "a 'b'"
OF_BOTH = 2
OMP_NUM_THREADS = 3
PYTHONPATH = "{path}"
PYTHONWARNINGS = "ignore"
"""


def test_workers_have_the_variables_of_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "here.py").write_text("")
    theirs = environment()
    path = f"{theirs['PYTHONPATH']}:{tmp_path}/modules"
    (tmp_path / "job.toml").write_text(JOB.format(path=path))
    done = subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", "run", "--config", "job.toml"],
        cwd=tmp_path, env=theirs | {"OF_BOTH": "1"}, timeout=120, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "seen").read_text()) == {
        "OF_FILE": "a 'b'", "OF_BOTH": "2", "OMP_NUM_THREADS": "3",
        "PYTHONWARNINGS": "ignore", "RANK": "0",
    }  # fmt: skip
    for left in (tmp_path / "ck" / ".elastic-ckpt").rglob("*"):
        assert left.is_dir() or b"a 'b'" not in left.read_bytes(), f"{left} has a value"


def test_they_go_before_those_of_the_jobs_python(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "workers")
    (tmp_path / "train.py").write_text(
        "import os, sys\n"
        "open('seen', 'w').write(sys.executable + ' ' + os.environ['VIRTUAL_ENV'])\n"
    )
    (tmp_path / "job.toml").write_text(
        f'dir = "ck"\nscript = "train.py"\nnproc = 1\npython = "{python}"\n\n[env]\n'
        'VIRTUAL_ENV = "other"\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", "run", "--config", "job.toml"],
        cwd=tmp_path, env=environment(), timeout=120, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen").read_text() == f"{python} other"
