"""The Dockerfile is linted; it is built nowhere here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run(
        [hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert (found.returncode, found.stdout) == (0, "")


def test_copied_paths_exist_and_are_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"]
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copies = [
        line.split()[1:-1] for line in lines if line.startswith("COPY") and "--from" not in line
    ]
    names = sorted(name for copy in copies for name in copy)
    assert names == sorted(kept)
    assert all((ROOT / name).exists() for name in names)


def test_image_has_the_bucket_extra() -> None:
    extra = re.search(r'^bucket = \["(.*)"\]$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert extra and f'/wheels/*.whl "{extra[1]}"' in (ROOT / "Dockerfile").read_text()
