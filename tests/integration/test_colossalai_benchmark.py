"""The benchmark of ColossalAI's save measures everything and leaves no files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmarks

pytest.importorskip("colossalai", reason="ColossalAI is not installed")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "colossalai_save.py"


def test_every_round_measures_every_subject(tmp_path):
    figures, place = tmp_path / "figures.json", tmp_path / "disk"
    place.mkdir()
    before = set(os.listdir("/dev/shm"))
    options = ["--size", "24", "--rounds", "2", "--directory", str(place), "--json", str(figures)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert len(found["seconds"]) == 5
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
    assert found["ratio_to_memcpy"] > 0
    assert "this package, memory tier" in done.stdout
    assert os.listdir(place) == []
    left = set(os.listdir("/dev/shm")) - before
    assert not any(name.startswith("colossalai-save-") for name in left)
